"""Pages rendered on the server; they work without script, and live where there is one."""
