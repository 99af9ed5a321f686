"""Suites of comparisons, one in each file. A new suite is a new file with a class that satisfies `suite.Suite`."""
