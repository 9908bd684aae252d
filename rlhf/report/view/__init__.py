"""The sections of the page, made from report.json alone."""
