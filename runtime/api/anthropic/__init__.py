"""Anthropic's messages API, translated into chats of OpenAI's API and back."""
