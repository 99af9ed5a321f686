"""How sure a finding is: tests, intervals and nulls. Each is scipy's or statsmodels' where they have it."""
