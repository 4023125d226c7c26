"""The tag policy over whole tables. The policy of one post is recipe/tag_policy."""
