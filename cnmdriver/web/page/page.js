// What is shown, and when: the daemon says what happens, and the page asks how it is.

import {
  byId, colours, drawDetail, drawEvents, drawHead, drawHosts, drawNames, drawNetworks,
  drawTunnels,
} from "./drawing.js";

const PACE = 200; // milliseconds between two looks at the whole
const AGAIN = 1500; // milliseconds until the daemon is tried again

let scene = null;
let chosen = null; // kind/id
let cameFrom = null; // the element that had the focus
let commands = null; // what `explain` says of the chosen thing's network
let looking = false;
let stale = false;

function arranged(topology) {
  const wanted = byId("search").value.trim().toLowerCase();
  const [kind, id] = (chosen ?? "").split("/");
  const found = (e) => !wanted
    || [e.label, ...e.addresses, e.mac].some((t) => t.toLowerCase().includes(wanted));
  const related = (e) => kind !== "network" || e.network === id;
  return {
    ...topology,
    chosen,
    colour: colours(topology.networks),
    host: new Map(topology.hosts.map((h) => [h.id, h])),
    network: new Map(topology.networks.map((n) => [n.id, n])),
    endpoint: new Map(topology.endpoints.map((e) => [e.id, e])),
    shown: (e) => found(e) && related(e),
    about: (thing) => [thing.network, thing.host].map((i) => i ?? ""),
  };
}

function thing() {
  const [kind, id] = (chosen ?? "").split("/");
  return chosen && scene[kind].get(id);
}

function draw() {
  if (!scene) return;
  scene = arranged(scene);
  drawHead(scene);
  drawNetworks(scene);
  drawTunnels(scene);
  drawHosts(scene);
  drawDetail(scene, thing(), commands);
  drawNames(scene);
  for (const group of document.querySelectorAll(".walk")) rove(group);
}

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store" });
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error);
  return content;
}

// One look at a time, and one more if something happened meanwhile.
async function look() {
  stale = true;
  if (looking) return;
  looking = true;
  try {
    while (stale) {
      stale = false;
      scene = await ask("topology");
      if (byId("line").className === "amiss") say("well", "● live");
      draw();
      await explain();
      await new Promise((done) => setTimeout(done, PACE));
    }
  } catch {
    say("amiss", "✕ no answer");
    setTimeout(look, AGAIN);
  } finally {
    looking = false;
  }
}

async function explain() {
  const shown = thing();
  const network = chosen?.startsWith("network/") ? shown?.id : shown?.network;
  const asked = chosen;
  let text = null;
  if (network) {
    try {
      text = (await ask("explain?network=" + encodeURIComponent(network))).commands;
    } catch (error) {
      text = "# " + error.message;
    }
  }
  if (asked !== chosen) return;
  commands = text;
  drawDetail(scene, thing(), commands);
}

// Events.

function say(health, text) {
  const line = byId("line");
  line.className = health;
  line.textContent = text;
}

function listen() {
  const source = new EventSource("events");
  source.onopen = () => {
    say("well", "● live");
    byId("log").replaceChildren();
  };
  source.onmessage = (message) => {
    const news = JSON.parse(message.data);
    drawEvents(scene, news.events);
    if (news.changed) look();
  };
  source.onerror = () => {
    say("amiss", "✕ no daemon");
    source.close();
    setTimeout(listen, AGAIN);
  };
}

// Choosing, by mouse and by keyboard.

function choose(target) {
  const place = target.closest("[data-kind]");
  if (!place) return;
  if (!place.closest("#details")) cameFrom = place;
  chosen = `${place.dataset.kind}/${place.dataset.id}`;
  commands = null;
  draw();
  byId("details").focus({ preventScroll: false });
  explain();
}

function back() {
  byId("search").value = "";
  chosen = commands = null;
  draw();
  if (cameFrom?.isConnected) cameFrom.focus();
}

/** Let Tab reach one thing of a group; the arrows reach the others. */
function rove(group) {
  const things = [...group.querySelectorAll("[data-kind]")];
  const current = things.find((t) => t === document.activeElement)
    ?? things.find((t) => t.tabIndex === 0) ?? things[0];
  for (const one of things) one.tabIndex = one === current ? 0 : -1;
}

const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

function walk(event) {
  const group = event.target.closest(".walk");
  const things = group ? [...group.querySelectorAll("[data-kind]")] : [];
  const at = things.indexOf(event.target);
  const to = event.key === "Home" ? 0 : event.key === "End" ? things.length - 1
    : at + (STEPS[event.key] ?? NaN);
  if (at < 0 || !things[to]) return;
  event.preventDefault();
  things[to].focus();
  rove(group);
}

document.addEventListener("click", (event) => choose(event.target));
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input[type=search]");
  if (event.key === "Escape") back();
  else if (event.key === "/" && !typing) {
    event.preventDefault();
    byId("search").focus();
  } else if (["Enter", " "].includes(event.key) && event.target.matches("g[data-kind]")) {
    event.preventDefault();
    choose(event.target);
  } else if (!typing) walk(event);
});
byId("search").addEventListener("input", draw);
byId("calls").addEventListener("change", (event) => {
  byId("log").classList.toggle("quiet", !event.target.checked);
});

listen();
