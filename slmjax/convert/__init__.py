"""slmjax parameters to and from other formats, by tables that are read in both directions."""
