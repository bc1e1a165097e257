// What is drawn. Names come from users: they get into the page as text only.

const SVG = "http://www.w3.org/2000/svg";
const SIGNS = { well: "✓", away: "○", amiss: "!" };
const COLOURS = 8;
const DENSE = 90; // endpoints, from which on an address is shown on demand only
const MANY = 8; // hosts, from which on tunnels are drawn faintly

export const byId = (id) => document.getElementById(id);

/** Make an element with a class and texts or elements in it. */
export function make(tag, name, ...content) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...content);
  return made;
}

function shape(tag, facts) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(facts)) made.setAttribute(name, value);
  return made;
}

/**
 * Let the children of an element be those of a list, each by its key: who stays keeps
 * its element, and with it the focus.
 */
export function keep(parent, things, key, begin, update) {
  const old = parent.children_ ?? new Map();
  const now = new Map(things.map((thing) => [key(thing), thing]));
  // First of all, as an element that is moved loses the focus.
  for (const [name, gone] of old) if (!now.has(name)) gone.remove();
  let place = parent.firstElementChild;
  for (const [name, thing] of now) {
    let child = old.get(name);
    if (!child) {
      child = begin(thing);
      if (parent.children_) child.classList.add("fresh");
    }
    update(child, thing);
    now.set(name, child);
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
  }
  parent.children_ = now;
}

/** Set an element's texts, by class, where they differ. */
function say(element, texts) {
  for (const [name, text] of Object.entries(texts)) {
    const part = element.querySelector("." + name);
    if (part.textContent !== text) part.textContent = text;
  }
}

function mark(element, thing, kind, chosen) {
  element.dataset.kind = kind;
  element.dataset.id = thing.id;
  element.setAttribute("aria-pressed", String(chosen === kind + "/" + thing.id));
  for (const health of Object.keys(SIGNS)) {
    element.classList.toggle(health, thing.health === health);
  }
}

/** Tell which of the colours is a network's; it depends on nothing but the list. */
export function colours(networks) {
  const order = networks.map((n) => n.id).sort();
  return new Map(order.map((id, number) => [id, `n${number % COLOURS}`]));
}

function own(element, colour) {
  element.style.setProperty("--own", `var(--${colour ?? "soft"})`);
}

export function drawNetworks(scene) {
  keep(byId("networks"), scene.networks, (n) => n.id,
    () => make("button", "network",
      make("span", "label"), make("span", "number"), make("span", "more")),
    (button, network) => {
      mark(button, network, "network", scene.chosen);
      own(button, scene.colour.get(network.id));
      const sign = network.health === "well" ? "" : SIGNS[network.health] + " ";
      say(button, {
        label: sign + network.label,
        number: String(network.endpoints),
        more: [network.mode, ...network.subnets].join(" · "),
      });
    });
}

// Tunnels: every two hosts that have an overlay network in common.

export function drawTunnels(scene) {
  const ends = scene.hosts.filter((host) => host.vtep);
  byId("tunnels").hidden = ends.length < 2;
  const svg = document.querySelector("#tunnels svg");
  const many = ends.length > MANY;
  const [width, height, rim] = [
    960, many ? 480 : ends.length > 2 ? 250 : 110, many ? 150 : 96,
  ];
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.classList.toggle("many", many);
  const places = new Map(ends.map((host, number) => {
    const turn = (2 * Math.PI * number) / ends.length - Math.PI * (ends.length === 2 ? 1 : 0.5);
    const [cos, sin] = [Math.cos(turn), Math.sin(turn)];
    return [host.id, {
      host,
      cos,
      sin,
      x: width / 2 + cos * (width / 2 - rim),
      y: height / 2 + sin * (height / 2 - 52),
    }];
  }));
  drawLinks(svg, scene, places);
  keep(svg.querySelector(".ends"), [...places.values()], (p) => p.host.id, beginEnd,
    (end, place) => {
      mark(end, place.host, "host", scene.chosen);
      end.setAttribute("transform", `translate(${place.x} ${place.y})`);
      end.setAttribute("aria-label", `host ${place.host.label}, ${place.host.state}`);
      name(end, place);
      say(end, {
        sign: SIGNS[place.host.health],
        name: place.host.label,
        vtep: place.host.vtep,
      });
    });
}

/** Put the names of a tunnel's end where no line goes: outside. */
function name(end, place) {
  const beside = Math.abs(place.cos) > 0.25;
  const x = beside ? Math.sign(place.cos) * 22 : 0;
  const y = beside ? 0 : place.sin > 0 ? 30 : -36;
  end.classList.toggle("left", beside && place.cos < 0);
  end.classList.toggle("right", beside && place.cos > 0);
  for (const [which, down] of [["name", 0], ["vtep", 14]]) {
    const text = end.querySelector("." + which);
    text.setAttribute("x", x);
    text.setAttribute("y", y + down);
  }
}

function beginEnd() {
  const end = shape("g", { class: "end", role: "button", tabindex: "-1" });
  end.append(
    shape("circle", { class: "dot", r: 15 }), shape("text", { class: "sign", y: 5 }),
    shape("text", { class: "name" }), shape("text", { class: "vtep" }),
  );
  return end;
}

function drawLinks(svg, scene, places) {
  const links = new Map();
  for (const network of scene.networks.filter((n) => n.vni)) {
    const hosts = network.hosts.filter((id) => places.has(id));
    hosts.forEach((a, number) => hosts.slice(number + 1).forEach((b) => {
      const key = a + " " + b;
      if (!links.has(key)) links.set(key, { key, a, b, networks: [] });
      links.get(key).networks.push(network.id);
    }));
  }
  const [kind, id] = (scene.chosen ?? "").split("/");
  keep(svg.querySelector(".links"), [...links.values()], (l) => l.key,
    () => shape("line", { class: "link" }),
    (line, link) => {
      const [a, b] = [places.get(link.a), places.get(link.b)];
      line.setAttribute("x1", a.x);
      line.setAttribute("y1", a.y);
      line.setAttribute("x2", b.x);
      line.setAttribute("y2", b.y);
      const on = kind === "network" ? link.networks.includes(id)
        : kind === "host" && (link.a === id || link.b === id);
      const states = [a.host.state, b.host.state];
      line.classList.toggle("amiss", states.includes("gone"));
      line.classList.toggle("away", states.includes("resting"));
      line.classList.toggle("on", on);
      line.classList.toggle("off", (kind === "network" || kind === "host") && !on);
    });
}

// Hosts: a card each, with their endpoints by network.

export function drawHosts(scene) {
  const board = byId("hosts");
  board.classList.toggle("dense", scene.endpoints.length > DENSE);
  const parts = new Map(scene.hosts.map((host) => [host.id, []]));
  for (const endpoint of scene.endpoints) {
    if (!parts.has(endpoint.host)) parts.set(endpoint.host, []);
    parts.get(endpoint.host).push(endpoint);
  }
  const hosts = [...parts.keys()].map((id) => scene.host.get(id) ?? unknown(id));
  keep(board, hosts, (h) => h.id, beginHost, (card, host) => {
    for (const health of Object.keys(SIGNS)) {
      card.classList.toggle(health, host.health === health);
    }
    drawHost(card, scene, host, parts.get(host.id));
  });
}

function unknown(id) {
  return { id, label: id.slice(0, 12), health: "away", state: "unknown", why: [], vtep: "" };
}

function beginHost() {
  const title = make("button", "title",
    make("b", "sign"), make("span", "label"), make("span", "more"));
  const card = make("article", "host walk", title, make("div", "groups"));
  card.append(make("p", "none", "no endpoints"));
  return card;
}

function drawHost(card, scene, host, endpoints) {
  const title = card.querySelector(".title");
  mark(title, host, "host", scene.chosen);
  const facts = [host.here ? "this host" : "", host.state, host.vtep ?? ""];
  say(title, {
    sign: SIGNS[host.health],
    label: host.label,
    more: facts.filter(Boolean).join(" · "),
  });
  card.querySelector(".none").hidden = endpoints.length > 0;
  const groups = new Map();
  for (const endpoint of endpoints) {
    if (!groups.has(endpoint.network)) groups.set(endpoint.network, []);
    groups.get(endpoint.network).push(endpoint);
  }
  keep(card.querySelector(".groups"), [...groups], ([id]) => id,
    () => make("section", "group", make("h3", "heading"), make("div", "chips")),
    (group, [id, listed]) => {
      own(group, scene.colour.get(id));
      const name = scene.network.get(id)?.label ?? id.slice(0, 12);
      say(group, { heading: `${name} (${listed.length})` });
      drawChips(group.querySelector(".chips"), scene, listed);
    });
}

function drawChips(parent, scene, listed) {
  keep(parent, listed, (e) => e.id,
    () => make("button", "chip", make("b", "sign"), make("span", "label"), make("span", "more")),
    (chip, endpoint) => {
      mark(chip, endpoint, "endpoint", scene.chosen);
      chip.classList.toggle("dim", !scene.shown(endpoint));
      chip.title = [endpoint.label, ...endpoint.addresses].join("  ");
      const [first = ""] = endpoint.addresses;
      say(chip, {
        sign: endpoint.health === "well" ? "" : SIGNS[endpoint.health],
        label: endpoint.label,
        more: first.split("/")[0],
      });
    });
}

// The head of the page.

export function drawHead(scene) {
  const amiss = scene.attention.length
    + scene.hosts.filter((h) => !h.here && h.health === "amiss").length;
  byId("host").textContent = scene.name;
  document.title = (amiss ? `! ${amiss} · ` : "") + "pynet " + scene.name;
  const health = byId("health");
  health.className = amiss ? "amiss" : "well";
  health.textContent = amiss ? `! ${amiss} to look at` : "✓ all is well";
  const store = scene.away ? "! away" : `revision ${scene.revision}`;
  const counts = [
    ["hosts", scene.hosts.length], ["networks", scene.networks.length],
    ["endpoints", scene.endpoints.length], ["store", store], ["Docker", scene.docker],
  ];
  keep(byId("counts"), counts, ([name]) => name,
    ([name]) => make("div", "", make("dt", "", name), make("dd", "value")),
    (part, [name, value]) => {
      part.classList.remove("fresh");
      part.classList.toggle("amiss", name === "store" && scene.away);
      say(part, { value: String(value) });
    });
  byId("attention").hidden = !scene.attention.length;
  keep(document.querySelector("#attention ul"), scene.attention, (text) => text,
    (text) => make("li", "", text), () => {});
  const empty = byId("empty");
  empty.hidden = scene.networks.length > 0;
  if (!empty.hidden && !empty.firstChild) {
    const line = scene.shared
      ? "docker network create -d pynet --ipam-driver pynet --subnet 10.1.0.0/24 blue"
      : "docker network create -d pynet blue";
    empty.append("There is no network yet. Make one: ", make("code", "", line));
  }
}

// Details of what was chosen.

export function drawDetail(scene, thing, commands) {
  const place = byId("detail");
  if (!thing) {
    place.replaceChildren(make("p", "hint",
      scene.chosen ? "It is gone."
        : "Choose a host, a network or an endpoint: click it, or go there with Tab and "
        + "the arrows and press Enter. Escape comes back."));
    place.dataset.shown = "";
    return;
  }
  const kind = scene.chosen.split("/")[0];
  const shown = JSON.stringify([kind, thing, commands, scene.about(thing)]);
  if (place.dataset.shown === shown) return;
  place.dataset.shown = shown;
  const scroll = place.querySelector("pre")?.scrollTop ?? 0;
  const list = make("dl");
  for (const [name, value] of FACTS[kind](scene, thing)) {
    if (value === "" || value === null || value === undefined) continue;
    list.append(make("dt", "", name), make("dd", "", ...[value].flat()));
  }
  place.replaceChildren(
    make("h3", "", `${SIGNS[thing.health]} ${thing.label}`),
    ...thing.why.map((text) => make("p", `why ${thing.health}`, text)),
    list,
  );
  if (commands !== null) {
    place.append(make("h2", "", "What is held for it here, as commands"));
    const text = make("pre", "", commands);
    text.tabIndex = 0;
    place.append(text);
    text.scrollTop = scroll;
  }
}

function link(kind, thing, id) {
  if (!thing) return id.slice(0, 12);
  const button = make("button", "go", thing.label);
  button.dataset.kind = kind;
  button.dataset.id = thing.id;
  return button;
}

const FACTS = {
  host: (scene, host) => [
    ["host", host.here ? "this one" : host.state],
    ["tunnels", host.vtep && `${host.vtep}, UDP port ${host.vxlan_port}`],
    ["version", host.version],
    ["since", host.since ? new Date(host.since * 1000).toLocaleString() : ""],
    ["behind", host.behind === null || host.behind === undefined ? "not known now"
      : host.behind ? `${host.behind} endpoints` : "no"],
    ["endpoints", String(scene.endpoints.filter((e) => e.host === host.id).length)],
    ["networks", scene.networks.filter((n) => n.hosts.includes(host.id))
      .map((n) => link("network", n, n.id))],
    ["id", make("code", "", host.id)],
  ],
  network: (scene, network) => [
    ["mode", network.mode + (network.internal ? ", internal" : "")],
    ["pools", network.subnets.join(", ")],
    ["gateway", [network.gateways.join(", "), network.gateway && `(${network.gateway}’s)`]
      .filter(Boolean).join(" ")],
    ["VNI", network.vni ? String(network.vni) : ""],
    ["MTU", String(network.mtu)],
    ["bridge", network.bridge],
    ["hosts", network.hosts.map((id) => link("host", scene.host.get(id), id))],
    ["endpoints", String(network.endpoints)],
    ["id", make("code", "", network.docker_id || network.id)],
  ],
  endpoint: (scene, endpoint) => [
    ["addresses", endpoint.addresses.join(", ")],
    ["MAC", endpoint.mac],
    ["network", link("network", scene.network.get(endpoint.network), endpoint.network)],
    ["host", link("host", scene.host.get(endpoint.host), endpoint.host)],
    ["published", endpoint.published
      .map((p) => `${p.host_ip ?? "*"}:${p.host_port} → ${p.port}/${p.protocol}`).join(", ")],
    ["device", endpoint.device],
    ["joined", endpoint.joined ? "yes" : "not yet"],
    ["id", make("code", "", endpoint.id)],
  ],
};

// Events, the latest on top.

const LONGEST = 300;
const LATE = 40; // events that may be about things whose names come later
const LEVELS = { warning: "!", error: "✕", change: "•" };

export function drawEvents(scene, events) {
  const log = byId("log");
  for (const event of events) {
    const { name, level, told } = wording(scene, event);
    const item = make("li", level + (event.event === "api.call" ? " call" : ""),
      make("time", "", clock(event.at)), make("b", "", LEVELS[level] ?? ""),
      make("span", "name", name), make("span", "facts", told));
    item.event_ = event;
    log.prepend(item);
  }
  while (log.childElementCount > LONGEST) log.lastElementChild.remove();
}

/** Name things in the latest events anew: Docker tells a name after the event. */
export function drawNames(scene) {
  for (const item of [...byId("log").children].slice(0, LATE)) {
    say(item, { facts: wording(scene, item.event_).told });
  }
}

function wording(scene, event) {
  return event.event === "api.call" ? call(scene, event.facts)
    : { name: event.event, level: event.level, told: facts(scene, event) };
}

/** Tell of a call of Docker in few words. */
function call(scene, { method = "", outcome, ms, error = "", network, endpoint, ...rest }) {
  const of = (things, id, own) => id
    && ([...(things?.values() ?? [])].find((t) => own(t).startsWith(id))?.label ?? id);
  const told = [
    of(scene?.endpoint, endpoint, (t) => t.id),
    of(scene?.network, network, (t) => t.docker_id),
    ...Object.values(rest), outcome, `${ms} ms`, error,
  ];
  return {
    name: method.split(".").pop(),
    level: ["ok", "absent"].includes(outcome) ? "info" : "error",
    told: told.filter(Boolean).join(" · "),
  };
}

function clock(at) {
  const when = new Date(typeof at === "number" ? at * 1000 : at);
  return Number.isNaN(when.getTime()) ? "" : when.toTimeString().slice(0, 8);
}

function facts(scene, event) {
  const named = { ...event.facts };
  for (const [kind, id] of Object.entries(event.ids ?? {})) {
    named[kind] = scene?.[kind].get(id)?.label ?? named[kind];
  }
  return Object.entries(named)
    .map(([name, value]) => `${name} ${Array.isArray(value) ? value.join(" ") : value}`)
    .join(" · ");
}
