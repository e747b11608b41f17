// The TensorBoard tab: chooses runs below the log folder, draws them by the dashboard's module, and draws them anew
// when their logs have grown. TensorBoard imports this module into a page of its own and calls render().

import { mount } from "./dashboard.js";

const EVERY = 10_000; // milliseconds between looks for something new

export async function render() {
  const style = (href) => {
    const link = document.createElement("link");
    link.rel = "stylesheet";
    link.href = href;
    document.head.append(link);
    return new Promise((done) => { link.onload = link.onerror = done; });
  };
  document.title = "Routing";
  document.documentElement.lang = "en";
  await Promise.all([style("dashboard.css"), style("tab.css")]);
  await new Tab(document.body).start();
}

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  Object.entries(attributes).forEach(([name, value]) => (name.startsWith("on") ? made.addEventListener(name.slice(2), value) : made.setAttribute(name, value)));
  made.append(...children);
  return made;
}

async function ask(path) {
  const answer = await fetch(new URL(path, import.meta.url));
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error ?? answer.statusText);
  return content;
}

class Tab {
  constructor(body) {
    this.choice = make("fieldset", {}, make("legend", {}, "Runs"));
    this.choice.hidden = true;
    this.live = make("input", { type: "checkbox", id: "live", checked: "", onchange: () => this.live.checked && this.look() });
    this.state = make("output", { role: "status" });
    this.page = make("div", { id: "gatewright" });
    this.message = make("p", { class: "message", hidden: "" });
    // Keys that are for the boxes are not for the dashboard.
    const nav = make("nav", { class: "runs", "aria-label": "Runs", onkeydown: (event) => event.stopPropagation() },
      this.choice, make("span", { class: "live" }, this.state, make("label", {}, this.live, " follow")));
    body.append(nav, this.message, this.page);
    if (window.parent !== window) this.wear(window.parent.document.body);
    this.runs = [];
    this.chosen = null; // names; null until there are runs
    this.drawn = "";
    this.pause = EVERY;
  }

  /** Dark or light as TensorBoard is, from now on. */
  wear(theirs) {
    const theme = () => (theirs.classList.contains("dark-mode") ? "dark" : "light");
    let last = theme();
    this.page.gatewrightState = { theme: last };
    new MutationObserver(() => {
      if (theme() === last) return;
      last = theme();
      this.page.gatewrightState.theme = last;
      if (this.data) mount(this.page, this.data);
    }).observe(theirs, { attributeFilter: ["class"] });
  }

  async start() {
    await this.look();
    const again = () => setTimeout(async () => {
      if (this.live.checked && !document.hidden) await this.look();
      again();
    }, this.pause);
    again();
  }

  /** Asks which runs there are, and draws the chosen ones if there is something new. */
  async look() {
    if (this.looking) { this.again = true; return; }
    this.looking = true;
    try {
      do {
        this.again = false;
        const { logdir, runs } = await ask("runs");
        this.runs = runs;
        this.listRuns();
        if (!runs.length) {
          this.say(`No routing log below ${logdir} yet. gatewright.moe.record.Recorder(model, run) writes one; this page shows it as soon as it is there.`);
        } else await this.draw();
      } while (this.again);
    } catch (error) {
      this.say(error instanceof TypeError ? "TensorBoard does not answer." : error.message);
    } finally {
      this.looking = false;
    }
  }

  listRuns() {
    const names = this.runs.map((run) => run.name);
    this.chosen = (this.chosen ?? names.slice(0, 1)).filter((name) => names.includes(name));
    if (!this.chosen.length) this.chosen = names.slice(0, 1);
    if (this.listed === names.join("\n")) return;
    this.listed = names.join("\n");
    this.choice.hidden = names.length < 2;
    this.choice.replaceChildren(this.choice.firstChild, ...names.map((name) => {
      const box = make("input", { type: "checkbox", value: name, onchange: () => this.choose(box) });
      box.checked = this.chosen.includes(name);
      return make("label", {}, box, ` ${name}`);
    }));
  }

  /** The first chosen run is the one that is shown; further ones are compared with it. */
  choose(box) {
    const chosen = this.chosen.filter((name) => name !== box.value);
    if (box.checked) chosen.push(box.value);
    if (!chosen.length) { box.checked = true; return; }
    this.chosen = chosen;
    this.look();
  }

  async draw() {
    const shown = this.chosen.map((name) => this.runs.find((run) => run.name === name));
    const state = JSON.stringify(shown);
    if (state === this.drawn) return;
    const start = performance.now();
    if (!this.drawn) this.state.textContent = "reading the log …";
    const data = await ask(`data?${new URLSearchParams(this.chosen.map((name) => ["run", name]))}`);
    if (data.message) { this.say(data.message); return; }
    await mount(this.page, data);
    this.data = data;
    this.page.hidden = false;
    this.message.hidden = true;
    this.drawn = state;
    this.state.textContent = `as of ${new Date().toLocaleTimeString()}`;
    // A log that takes long to read is read less often.
    this.pause = Math.max(EVERY, 10 * (performance.now() - start));
  }

  say(text) {
    this.message.textContent = text;
    this.message.hidden = false;
    this.page.hidden = true;
    this.state.textContent = "";
    this.drawn = "";
  }
}
