"""What runs inside vLLM: a KV connector that puts skills into its cache instead of having them prefilled.

`connector.py` is the one module that imports vLLM. All others run, and are tested, without it.
"""
