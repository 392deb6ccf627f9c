"""Training a model (the student) on the predictions of others (its teachers)."""
