"""The gateway in front of a model server: requests go through byte for byte, and it says what the prefix cache missed."""
