"""The shared store. `store.EtcdStore` loads grpc, 25 MB: import it only if needed."""

from cnmdriver.store.etcd.options import Options, read_url

__all__ = ["Options", "read_url"]
