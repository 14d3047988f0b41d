"""What a run found: results, targets, tables, charts and files."""
