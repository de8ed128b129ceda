"""Shards on many hosts, and the proof that together they judged everything once."""
