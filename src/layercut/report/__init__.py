"""From a finished run to the files people and programs read: JSON, report.html, model card."""
