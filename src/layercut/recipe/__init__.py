"""YAML to a validated, frozen recipe; needs no torch."""
