"""The vLLM plugin: a KV connector that writes skills into vLLM's cache, so that vLLM does not prefill them.

Only `connector.py` imports vLLM. All other modules run, and are tested, without it.
"""
