"""How one weight is computed from parts of files: frozen values, one file a formula, no torch."""
