"""Text and rows: from a source named in the recipe to token windows."""
