"""Policy weights → rollout engines, bucket by bucket, with a version and a checksum."""
