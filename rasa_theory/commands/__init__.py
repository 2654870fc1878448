"""The commands: arguments, progress and what they print; nothing below them prints."""
