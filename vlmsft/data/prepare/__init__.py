"""Conversations and an image archive made into what the data modules read. No torch, no NeMo, no Hydra; Energon only
where its metadata is written."""
