"""Layouts, masks and plans (who holds, computes and sends what, when), and the executor and carriers that run them."""
