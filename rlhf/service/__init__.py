"""The service: HTTP API, dashboard, annotation and the inbox watcher over plan, store and report.

Runs and batches stay files, written by the same functions as the command line's. The database
holds what only the service knows: people, tokens, annotations, tasks, uploads and the audit log.
"""
