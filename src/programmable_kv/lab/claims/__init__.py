"""Published claims, and what our records say about them."""
