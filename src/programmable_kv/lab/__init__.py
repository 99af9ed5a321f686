"""Why it works: experiments on the loaded model, each of which writes a record."""
