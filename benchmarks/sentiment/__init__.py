"""Sentiment from text, audio and vision (CMU-MOSI, CMU-MOSEI, CH-SIMS)."""
