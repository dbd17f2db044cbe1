"""One file per source of dialogues: raw files in, records out."""
