"""Code that the families share: tables of tensor names, and reading and writing of config.json."""
