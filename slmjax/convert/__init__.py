"""Our parameters to and from other formats, by tables read in both directions."""
