"""The public checkpoint formats: what their config.json says and what their tensors are called. Mappings, no files."""
