"""The model: stock LLaVA-OneVision checkpoints built, loaded, up-cycled, decoded and exported. Trains nothing."""
