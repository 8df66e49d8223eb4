"""The operator: definition and checks (`functional`), registration (`library`), implementations (`reference`, `cpu`)."""
