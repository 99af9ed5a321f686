"""What is compared with what, one suite a file. A new suite is a new file with a class that satisfies `suite.Suite`."""
