"""Why a prefix cache missed: requests compared as a cache compares them, from a log alone. No model, no gateway, no network."""
