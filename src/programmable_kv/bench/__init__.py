"""How fast: each bench against what a user would do instead, compared within one run, written as a record."""
