"""Adapters: each reads one layout that tools leave behind and gives posts. Nothing here downloads."""
