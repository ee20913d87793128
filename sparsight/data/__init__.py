"""Where samples come from: importers, the scene generator, the sample store and the splits. Trains nothing."""
