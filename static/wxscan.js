// A login box for every element with data-wxscan="scan" or "auth", the two
// flows. When somebody has logged in, the element gets a "wxscan:login" event
// whose detail is the answer of /wechat/checklogin, with openid and token.
// Other sites can include this script once their origin is in ALLOWED_ORIGINS.
"use strict";
(() => {
  const base = new URL(document.currentScript.src).origin;
  const chinese = /^zh\b/i.test(navigator.language);
  const inWeChat = /MicroMessenger/i.test(navigator.userAgent);
  const say = (zh, en) => (chinese ? zh : en);

  // first resolves at the first of some events, each [target, name], or after ms
  // if that is given. It leaves no listener behind.
  const first = (events, ms) => new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      for (const [target, name] of events) target.removeEventListener(name, end);
      resolve();
    };
    const timer = ms && setTimeout(end, ms);
    for (const [target, name] of events) target.addEventListener(name, end);
  });

  // sleep also ends when there may be no need to wait any longer.
  const sleep = (ms, signal) => first([[signal, "abort"], [window, "online"], [document, "visibilitychange"]], ms);

  // shown resolves when somebody can see the page.
  const shown = async (signal) => {
    while (document.hidden && !signal.aborted) await first([[signal, "abort"], [document, "visibilitychange"]]);
  };

  const words = (code) => ({
    wechat_unreachable: say("服务器暂时连不上微信。", "The server cannot reach WeChat just now."),
    wechat_timeout: say("微信没有及时应答。", "WeChat did not answer in time."),
    wechat_refused: say("微信拒绝了请求，请联系网站管理员。", "WeChat refused. Please tell the people who run this site."),
    too_many_tickets: say("现在登录的人太多，请稍后再试。", "Too many people are logging in. Try again in a moment."),
    rate_limited: say("请求太频繁，请稍后再试。", "Too many requests. Try again in a moment."),
    lost: say("网络连接中断，正在重试…", "The connection is lost. Trying again…"),
  })[code] || say("出错了，请重试。", "Something went wrong. Please try again.");

  // ask returns the JSON of an answer, or throws its error code: "lost" if there
  // is none, "hidden" if it is not worth a connection any more, since nobody sees
  // the page; over HTTP/1.1 a browser has six for a site, and a poll keeps one.
  async function ask(path, signal, whileShown = false) {
    const stop = new AbortController();
    const give = () => stop.abort();
    let code = "lost";
    const hide = () => { code = "hidden"; give(); };
    const timer = setTimeout(give, 40e3); // above the server's longest wait
    signal.addEventListener("abort", give);
    if (whileShown) document.addEventListener("visibilitychange", hide);
    try {
      const response = await fetch(base + path, { signal: stop.signal, cache: "no-store", credentials: "include" });
      const answer = await response.json();
      if (!response.ok) throw Object.assign(new Error(), { code: answer.error });
      return answer;
    } catch (err) {
      throw err.code && typeof err.code === "string" ? err : Object.assign(new Error(), { code });
    } finally {
      clearTimeout(timer);
      signal.removeEventListener("abort", give);
      if (whileShown) document.removeEventListener("visibilitychange", hide);
    }
  }

  const make = (tag, className, props) => Object.assign(document.createElement(tag), { className, ...props });

  // A Box is what one element shows.
  class Box {
    constructor(element) {
      this.code = make("div", "wxscan-code");
      this.status = make("p", "wxscan-status");
      this.status.setAttribute("role", "status"); // read aloud whenever it changes
      this.time = make("p", "wxscan-time");
      this.time.setAttribute("role", "timer"); // and not read aloud every second
      this.more = make("div", "wxscan-more");
      element.classList.add("wxscan");
      element.replaceChildren(this.code, this.status, this.time, this.more);
    }
    say(text) {
      if (this.status.textContent !== text) this.status.textContent = text;
    }
    // pressed shows a button and resolves when it is pressed.
    pressed(label, signal) {
      const button = make("button", "", { type: "button", textContent: label });
      this.more.replaceChildren(button);
      return first([[button, "click"], [signal, "abort"]]).then(() => button.remove());
    }
    // show draws the QR code of a ticket; it rejects if the picture does not come.
    show(qr, flow) {
      const picture = make("img", "", {
        alt: say("登录二维码，请用微信扫描", "Login QR code, to be scanned with WeChat"),
        src: base + "/wechat/qr.png?ticket=" + encodeURIComponent(qr.ticket),
      });
      this.code.className = "wxscan-code";
      this.code.replaceChildren(picture);
      this.more.replaceChildren();
      if (new URL(qr.url).pathname.startsWith("/demo/")) {
        this.more.append(make("a", "wxscan-demo", { href: qr.url, target: "_blank", rel: "noopener", textContent: say("打开模拟手机", "Open the simulated phone") }));
      }
      return picture.decode().then(() => this.say(flow === "auth"
        ? say("请用微信扫一扫，并同意授权", "Scan with WeChat, and agree")
        : say("请用微信扫一扫，关注公众号即可登录", "Scan with WeChat, and follow the account to log in")));
    }
    tick(deadline) {
      const left = Math.max(0, Math.ceil((deadline - Date.now()) / 1000));
      this.time.textContent = say("剩余 ", "Time left ") + Math.floor(left / 60) + ":" + String(left % 60).padStart(2, "0");
    }
    scanned(answer, again) {
      this.code.className = "wxscan-result";
      this.code.replaceChildren(make("p", "wxscan-number", { textContent: answer.number }));
      const button = make("button", "", { type: "button", textContent: say("换一个二维码", "Another QR code") });
      button.addEventListener("click", again); // for whom the phone lost the page
      this.more.replaceChildren(button);
      this.say(say("已扫描。请在手机上选择这个数字", "Scanned. Choose this number on your phone"));
    }
    done(answer) {
      this.code.className = "wxscan-result";
      this.code.replaceChildren(answer.avatar
        ? make("img", "wxscan-avatar", { alt: "", src: answer.avatar, referrerPolicy: "no-referrer" })
        : make("p", "wxscan-mark wxscan-good", { textContent: "✓" }));
      this.code.append(make("p", "wxscan-openid", { textContent: answer.openid }));
      this.say(answer.nickname ? say(`登录成功，${answer.nickname}`, `Welcome, ${answer.nickname}`) : say("登录成功", "You are logged in"));
      this.time.textContent = "";
      this.more.replaceChildren();
    }
  }

  // follow polls until the ticket is done or expired, and returns the answer: only
  // while somebody can see the page, and at once when it is seen again. It bears a
  // lost connection, with ever longer pauses.
  async function follow(qr, box, signal, again) {
    let deadline = Date.now() + qr.expiresIn * 1000;
    box.tick(deadline);
    const ticking = setInterval(() => box.tick(deadline), 1000);
    let prompt = box.status.textContent;
    let seen = "pending";
    try {
      for (let pause = 1000, wait = 25; ;) {
        await shown(signal);
        if (signal.aborted) return {};
        const asked = Date.now();
        try {
          const answer = await ask(`/wechat/checklogin?ticket=${encodeURIComponent(qr.ticket)}&wait=${wait}&status=${seen}`, signal, true);
          if (signal.aborted || (answer.status !== "pending" && answer.status !== "scanned")) return answer;
          deadline = Date.now() + answer.expiresIn * 1000;
          pause = 1000;
          wait = 25;
          if (answer.status !== seen) {
            seen = answer.status;
            box.scanned(answer, again);
            prompt = box.status.textContent;
            continue;
          }
          box.say(prompt);
          if (Date.now() - asked < 1000) await sleep(1000, signal); // the server is going down
        } catch (err) {
          if (signal.aborted) return {};
          if (err.code === "hidden") continue;
          if (Date.now() > deadline) return { status: "expired" };
          box.say(words(err.code));
          wait = 0; // to learn at once that the connection is back
          await sleep(pause, signal);
          pause = Math.min(2 * pause, 15e3);
        }
      }
    } finally {
      clearInterval(ticking);
    }
  }

  // leave goes to the authorize page at once: inside WeChat nobody can scan the
  // own screen. The page comes back to find the ticket in sessionStorage.
  async function leave(box, signal) {
    const ticket = sessionStorage.getItem("wxscan");
    if (ticket) {
      const answer = await ask("/wechat/checklogin?ticket=" + encodeURIComponent(ticket), signal);
      sessionStorage.removeItem("wxscan");
      sessionStorage.removeItem("wxscan-page");
      if (answer.login) return answer;
      await box.pressed(say("用微信登录", "Log in with WeChat"), signal);
    }
    const qr = await ask("/wechat/getauthqr", signal);
    sessionStorage.setItem("wxscan", qr.ticket);
    sessionStorage.setItem("wxscan-page", location.href);
    location.assign(qr.url);
    return new Promise(() => {});
  }

  async function logIn(element, signal) {
    const box = new Box(element);
    const flow = element.dataset.wxscan;
    for (let answer; !signal.aborted;) {
      try {
        box.say(say("正在获取二维码…", "Getting a QR code…"));
        if (inWeChat && flow === "auth") {
          answer = await leave(box, signal);
        } else {
          const qr = await ask(flow === "auth" ? "/wechat/getauthqr" : "/wechat/getloginqr", signal);
          if (signal.aborted) return;
          await box.show(qr, flow);
          answer = await follow(qr, box, signal, () => start(element));
        }
      } catch (err) {
        if (signal.aborted) return;
        box.say(words(err.code));
        const pressed = box.pressed(say("重试", "Try again"), signal);
        await (err.code === "lost" ? Promise.race([pressed, sleep(15e3, signal)]) : pressed);
        continue;
      }
      if (signal.aborted) return;
      if (answer.login) {
        box.done(answer);
        element.dispatchEvent(new CustomEvent("wxscan:login", { bubbles: true, detail: answer }));
        const { returnTo } = element.dataset;
        const target = returnTo && new URL(returnTo, location);
        if (target && target.origin === location.origin) location.assign(target);
        return;
      }
      if (answer.status === "declined") {
        box.code.replaceChildren(make("p", "wxscan-mark wxscan-bad", { textContent: "!" }));
        box.time.textContent = "";
        box.say(say("已在手机上拒绝", "Declined on the phone"));
        await box.pressed(say("重新扫码", "Scan again"), signal);
        continue;
      }
      box.code.classList.add("old");
      box.time.textContent = "";
      box.say(say("二维码已过期", "The QR code has expired"));
      await shown(signal);
    }
  }

  const running = new WeakMap();
  function start(element) {
    if (running.has(element)) running.get(element).abort();
    const control = new AbortController();
    running.set(element, control);
    logIn(element, control.signal);
  }

  // own shows the number of the ticket that this tab left with: whoever is
  // inside WeChat has no other page in front of them.
  async function own(element) {
    const ticket = sessionStorage.getItem("wxscan");
    const { number } = await ask("/wechat/checklogin?ticket=" + encodeURIComponent(ticket), new AbortController().signal).catch(() => ({}));
    if (!number) return;
    element.lastElementChild.textContent = number;
    element.hidden = false;
  }

  // Our own pages.
  function page() {
    document.documentElement.lang = chinese ? "zh-CN" : "en";
    const { wxscanResult } = document.body.dataset;
    if (wxscanResult === "done" && sessionStorage.getItem("wxscan")) location.replace(sessionStorage.getItem("wxscan-page"));
    if (wxscanResult === "confirm") {
      addEventListener("touchstart", () => {}); // without a listener, iOS has no :active
      if (sessionStorage.getItem("wxscan")) own(document.querySelector(".wxscan-own"));
    }
    if (wxscanResult === "failed") {
      const reason = new URLSearchParams(location.search).get("reason");
      const known = [...document.querySelectorAll("[data-reason]")];
      const match = known.find((p) => p.dataset.reason === reason);
      if (match) known.forEach((p) => { p.hidden = p !== match; });
    }
    const tabs = document.querySelectorAll("[data-wxscan-flow]");
    const box = document.querySelector("[data-wxscan]");
    const choose = (flow) => {
      box.dataset.wxscan = flow;
      tabs.forEach((tab) => tab.setAttribute("aria-pressed", String(tab.dataset.wxscanFlow === flow)));
    };
    tabs.forEach((tab) => tab.addEventListener("click", () => { choose(tab.dataset.wxscanFlow); start(box); }));
    if (tabs.length) choose(inWeChat ? "auth" : "scan");
  }

  function run() {
    if (document.body.classList.contains("wxscan-page")) page();
    const style = base + "/static/wxscan.css";
    if (document.querySelector("[data-wxscan]") && ![...document.styleSheets].some((sheet) => sheet.href === style)) {
      document.head.append(make("link", "", { rel: "stylesheet", href: style }));
    }
    document.querySelectorAll("[data-wxscan]").forEach(start);
  }
  if (document.readyState === "loading") addEventListener("DOMContentLoaded", run);
  else run();
})();
