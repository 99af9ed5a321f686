"""Over HTTP: the gateway in front of a model server, which forwards byte for byte and says what the prefix cache missed; and a
server of a model with notebooks."""
