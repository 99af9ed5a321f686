"""`pkv demo`: one cached policy, four fields flipped, every edit mode against a full prefill."""
