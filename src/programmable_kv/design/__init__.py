"""Visibility by design: which part of a context may read which, so that an edit's price and exactness are structural."""
