"""The options of the group ``[broker]``: where instructions come from, and TLS on the way there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oslo_config import cfg

from agent.rpc.tls import BrokerTls

DURABLE, QUORUM = "durable", "quorum"

OPTIONS = (
    cfg.StrOpt(
        "url",
        sample_default="filesystem:///var/lib/reeve/broker",
        secret=True,
        help="Where instructions come from: amqp://user:password@host:5672/vhost (RabbitMQ), the same with amqps:// "
        "and port 5671 (with TLS) or filesystem:///folder (no broker: a folder that sender and agent share). The nodes "
        "of a cluster: amqp://user:password@host1:5672,host2:5672,host3:5672/vhost. Default: the folder broker/ in "
        "state_dir.",
    ),
    cfg.StrOpt(
        "queues",
        default=DURABLE,
        choices=(DURABLE, QUORUM),
        help="What the queues of native instructions, replies and reports are: durable, which lie on one node of the "
        "broker, or quorum, which a cluster has on several, so that one may fail. All hosts and senders have the same.",
    ),
    cfg.StrOpt(
        "tls-ca-file",
        sample_default="/etc/reeve/tls/ca.pem",
        help="With amqps: PEM file with the authorities that may have signed the broker's certificate. Default: the "
        "system's.",
    ),
    cfg.StrOpt(
        "tls-certificate-file",
        sample_default="/etc/reeve/tls/host.pem",
        help="With amqps, for brokers that ask for one: PEM file with this node's certificate and its chain. "
        "Default: none.",
    ),
    cfg.StrOpt(
        "tls-key-file",
        sample_default="/etc/reeve/tls/host.key",
        help="The key of tls_certificate_file, PEM without a passphrase. Default: it is in the same file.",
    ),
    cfg.StrOpt(
        "tls-server-name",
        sample_default="<the host in url>",
        help="With amqps: the name that must be in the broker's certificate.",
    ),
    cfg.BoolOpt(
        "tls-insecure",
        default=False,
        help="With amqps: check neither the broker's certificate nor its name. Whoever can reach the connection can "
        "then pose as the broker, read the password and give this node instructions. For trying things out.",
    ),
    cfg.IntOpt("prefetch", default=32, min=1, max=10000, help="Messages held without acknowledgement, at most."),
    cfg.FloatOpt(
        "poll-seconds", default=0.02, min=0.001, max=10, help="How often a folder broker is looked at, seconds."
    ),
    cfg.IntOpt(
        "reply-seconds",
        default=60,
        min=0,
        mutable=True,
        help="How long a reply is tried whose reply queue does not exist.",
    ),
)


def tls(values: Mapping[str, Any]) -> BrokerTls:
    """What the options ``tls_…`` come to. The files are looked at when a connection is made."""
    return BrokerTls(
        ca_file=values["tls_ca_file"] or "",
        certificate_file=values["tls_certificate_file"] or "",
        key_file=values["tls_key_file"] or "",
        server_name=values["tls_server_name"] or "",
        insecure=values["tls_insecure"],
    )
