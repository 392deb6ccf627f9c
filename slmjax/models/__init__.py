"""The decoder that assembles every family, and one declarative file a family."""
