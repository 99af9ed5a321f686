"""Models trained from scratch, in minutes, on policies of a few tokens: when do notes appear?"""
