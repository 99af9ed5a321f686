"""`pkv demo`: edits four fields of one cached policy in every edit mode and compares each with a full prefill."""
