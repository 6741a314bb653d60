"""Every operation in chunks of plain PyTorch, for devices that no compiled backend serves."""
