"""The stages, one a file: options, and a pure function from a draft to the next one."""
