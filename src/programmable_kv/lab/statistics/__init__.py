"""Tests, intervals and nulls that say how certain a finding is; scipy's or statsmodels' own where they have them."""
