"""SGLang's own cache and this engine, given the same requests at the same slots and tokens."""
