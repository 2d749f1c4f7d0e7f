// A login box for every element with data-wxscan, which lists the ways to log in,
// such as "scan,auth": the first is shown, the next where that fails or on demand.
// When somebody has logged in, the element gets a "wxscan:login" event whose
// detail is the answer of /wechat/checklogin, with openid and token.
// Other sites can include this script once their origin is in ALLOWED_ORIGINS.
"use strict";
(() => {
  const base = new URL(document.currentScript.src).origin;
  const isOurs = document.body?.classList.contains("wxscan-page"); // a page of wxscan's own
  const inWeChat = /MicroMessenger/i.test(navigator.userAgent);
  const onPhone = !inWeChat && /Mobi/i.test(navigator.userAgent) && !/iPad/.test(navigator.userAgent);

  const languages = { "zh-CN": "简体", "zh-TW": "繁體", en: "English" };
  const language = (isOurs && /wxscan_language=(zh-CN|zh-TW|en)/.exec(document.cookie)?.[1]) ||
    (!/^zh\b/i.test(navigator.language) ? "en" : /TW|HK|MO|Hant/i.test(navigator.language) ? "zh-TW" : "zh-CN");
  const say = (...texts) => texts[Object.keys(languages).indexOf(language)];
  const words = {
    wechat_unreachable: say("暂时连不上微信，请稍后再试", "暫時無法連線到微信，請稍後再試", "WeChat cannot be reached just now."),
    wechat_timeout: say("微信没有及时应答，请重试", "微信沒有及時回應，請重試", "WeChat did not answer in time."),
    wechat_refused: say("微信拒绝了请求，请联系网站管理员", "微信拒絕了要求，請聯絡網站管理員", "WeChat refused. Please tell the site’s owner."),
    too_many_tickets: say("登录的人太多，请稍后再试", "登入的人太多，請稍後再試", "Too many people are logging in. Try again soon."),
    rate_limited: say("操作太频繁，请稍后再试", "操作太頻繁，請稍後再試", "Too many requests. Try again in a moment."),
    lost: say("网络连接中断，正在重试…", "網路連線中斷，正在重試…", "The connection is lost. Trying again…"),
    error: say("出错了，请重试", "發生錯誤，請重試", "Something went wrong. Please try again."),
    loading: say("正在获取二维码…", "正在取得 QR 碼…", "Getting a QR code…"),
    picture: say("登录二维码，请用微信扫描", "登入 QR 碼，請用微信掃描", "Login QR code, to be scanned with WeChat"),
    scan: say("请用微信扫一扫", "請用微信掃一掃", "Scan with WeChat"),
    press: say("请长按识别二维码", "請長按辨識 QR 碼", "Press the code and hold"),
    album: say("长按保存图片，在微信里扫一扫从相册选取", "長按儲存圖片，在微信裡掃一掃從相簿選取", "Save the picture; scan it in WeChat, from the album"),
    orLink: say("或复制链接，在微信聊天中打开", "或複製連結，在微信聊天中開啟", "Or copy the link, and open it in a WeChat chat"),
    follow: say("首次登录需关注公众号", "首次登入需關注公眾號", "The first time, follow the account"),
    agree: say("扫码后请按手机提示操作", "掃碼後請依手機提示操作", "Then look at your phone"),
    instead: say("刚才的方式暂不可用，已自动换一种", "剛才的方式暫時無法使用，已自動換一種", "The other way fails just now, so here is this one"),
    left: say("有效期剩余 ", "有效時間剩餘 ", "Valid for "),
    expired: say("二维码已过期", "QR 碼已過期", "The QR code has expired"),
    scanned: say("已扫描，请在手机上选择这个数字", "已掃描，請在手機上選擇這個數字", "Scanned. Choose this number on your phone"),
    declined: say("已在手机上拒绝", "已在手機上拒絕", "Declined on the phone"),
    unfinished: say("登录未完成", "登入未完成", "You are not logged in"),
    done: say("您已登录", "您已登入", "You are logged in"), copied: say("已复制", "已複製", "Copied"),
    retry: say("重试", "重試", "Try again"), refresh: say("刷新二维码", "重新整理 QR 碼", "New QR code"),
    another: say("换一种方式", "換一種方式", "Another way"), phone: say("打开模拟手机", "開啟模擬手機", "Simulated phone"),
    save: say("保存图片", "儲存圖片", "Save the picture"), copyLink: say("复制链接", "複製連結", "Copy the link"),
    logOut: say("退出登录", "登出", "Log out"), goOn: say("继续", "繼續", "Continue"),
  };

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
  const turned = [document, "visibilitychange"];

  // sleep also ends when there may be no need to wait any longer.
  const sleep = (ms, signal) => first([[signal, "abort"], [window, "online"], turned], ms);

  // shown resolves when somebody can see the page.
  const shown = async (signal) => {
    while (document.hidden && !signal.aborted) await first([[signal, "abort"], turned]);
  };

  // ask returns the JSON of an answer, or throws its error code: "lost" if there
  // is none, "hidden" if it is not worth a connection any more, since nobody sees
  // the page; over HTTP/1.1 a browser has six for a site, and a poll keeps one.
  async function ask(path, signal, whileShown = false) {
    const stop = new AbortController();
    const ends = [[signal, "abort"], [stop.signal, "abort"], ...(whileShown ? [turned] : [])];
    first(ends, 40e3).then(() => stop.abort()); // that is above the server's longest wait
    try {
      const response = await fetch(base + path, { signal: stop.signal, cache: "no-store", credentials: "include" });
      const answer = await response.json();
      if (!response.ok) throw Object.assign(new Error(), { code: answer.error });
      return answer;
    } catch (err) {
      const code = whileShown && document.hidden ? "hidden" : "lost";
      throw typeof err.code === "string" ? err : Object.assign(new Error(), { code });
    } finally {
      stop.abort();
    }
  }
  const poll = (ticket, signal, more = "", whileShown = false) =>
    ask("/wechat/checklogin?ticket=" + encodeURIComponent(ticket) + more, signal, whileShown);

  // copy also works over plain http, where browsers have no clipboard.
  async function copy(text) {
    if (navigator.clipboard) return navigator.clipboard.writeText(text);
    const field = document.body.appendChild(make("textarea", "", { value: text }));
    field.select();
    document.execCommand("copy");
    field.remove();
  }

  const make = (tag, className, props) => Object.assign(document.createElement(tag), { className, ...props });
  const button = (className, textContent, onclick) => make("button", className, { type: "button", textContent, onclick });
  const icon = (className, path) => make("span", className, {
    innerHTML: `<svg viewBox="0 0 24 24" aria-hidden="true"><path d="${path}"/></svg>`,
  });
  const good = () => icon("wxscan-mark wxscan-good", "M5.5 12.5l4.5 4.5 9-9.5");
  const bad = () => icon("wxscan-mark wxscan-bad", "M12 5v9M12 18.5v.01");

  // picture is a QR code: one that a phone can save, or one that is sharp at any size.
  const picture = (qr) => make("img", "", {
    alt: words.picture,
    src: `${base}/wechat/qr.${onPhone || inWeChat ? "png" : "svg"}?ticket=${encodeURIComponent(qr.ticket)}`,
  });

  // The ways to log in: where a code comes from, how it is shown, what to know about it.
  const ways = {
    scan: { begin: "/wechat/getloginqr", show: picture, hint: words.follow },
    auth: { begin: "/wechat/getauthqr", show: picture, hint: words.agree },
  };

  // A Box is what one element shows: a face, words below it, and what can be pressed.
  // What is news is read aloud, but not every second of the time.
  class Box {
    constructor(element) {
      element.classList.add("wxscan");
      element.classList.toggle("wxscan-handheld", onPhone);
      element.innerHTML = `<div></div><div class="wxscan-words"><div role="status"><p class="wxscan-status"></p>
        <p class="wxscan-hint"></p></div><p class="wxscan-time" role="timer"></p></div><div class="wxscan-more"></div>`;
      this.face = element.firstChild;
      for (const part of ["status", "hint", "time", "more"]) this[part] = element.querySelector(".wxscan-" + part);
    }
    say(status, hint = "") {
      if (this.status.textContent !== status) this.status.textContent = status;
      if (this.hint.textContent !== hint) this.hint.textContent = hint;
    }
    // look changes all but the words. What had the focus hands it on.
    look(kind, nodes, offers) {
      this.held ||= [this.face, this.more].some((part) => part.contains(document.activeElement));
      this.face.className = "wxscan-code " + kind;
      this.face.replaceChildren(...nodes.filter(Boolean));
      this.more.replaceChildren(...offers.filter(Boolean));
      this.time.textContent = "";
      const next = this.face.querySelector("button") || this.more.querySelector("button, a");
      if (!this.held || !next) return;
      next.focus();
      this.held = false;
    }
    // show shows a new code; it rejects if the picture does not come.
    async show(qr, way, note, another) {
      const code = way.show(qr);
      if (code.decode) await code.decode();
      const link = onPhone && way === ways.auth && button("wxscan-main", words.copyLink, async () => {
        await copy(qr.url);
        this.say(words.copied, words.orLink);
      });
      const save = onPhone && make("a", "wxscan-button", { href: code.src, download: "login.png", textContent: words.save });
      const isDemo = qr.url && new URL(qr.url).pathname.startsWith("/demo/");
      this.look("", [code], [link, save, isDemo && simulate(qr.url), another]);
      if (onPhone) this.say(words.album, note || (link ? words.orLink : ""));
      else this.say(inWeChat ? words.press : words.scan, note || way.hint);
    }
    tick(deadline) {
      const left = Math.max(0, Math.ceil((deadline - Date.now()) / 1000));
      this.time.textContent = words.left + Math.floor(left / 60) + ":" + String(left % 60).padStart(2, "0");
    }
    scanned(answer, again) { // again is for whom the phone lost the page
      const number = make("p", "wxscan-number", { textContent: answer.number });
      this.look("wxscan-result", [good(), number], [button("wxscan-button", words.refresh, again)]);
      this.say(words.scanned);
    }
    // stop says what ended a login, and resolves when the button is pressed: that
    // on the old code, or another.
    stop(signal, text, label, another, isOld = false) {
      const again = button(isOld ? "wxscan-again" : "wxscan-main", label);
      if (isOld) this.look("old", [this.face.querySelector("img"), again], [another]);
      else this.look("wxscan-result", [bad()], [again, another]);
      this.say(text);
      return first([[again, "click"], [signal, "abort"]]);
    }
    // who shows somebody who is logged in.
    who({ openid, nickname, avatar }, offers) {
      const short = openid.length > 16 ? openid.slice(0, 6) + "…" + openid.slice(-4) : openid;
      const id = button("wxscan-openid", short, () => copy(openid).then(() => this.say(words.copied)));
      id.title = openid;
      id.append(icon("", "M9 9h11v11H9zM5 15H4V4h11v1"));
      const face = avatar ? make("img", "wxscan-avatar", { alt: "", src: avatar, referrerPolicy: "no-referrer" }) : good();
      this.look("wxscan-result", [face, nickname && make("p", "wxscan-name", { textContent: nickname }), id], offers);
      this.say(words.done);
    }
  }

  // simulate shows the demo's phone: beside our login card where there is room for
  // it, else behind a link. It returns the link if that is to stand in the box.
  function simulate(url) {
    const link = make("a", "wxscan-button wxscan-demo", { href: url, target: "_blank", rel: "noopener", textContent: words.phone });
    if (!isOurs || new URL(url).origin !== location.origin) return link;
    const frame = frames[0];
    if (frame) frame.location.replace(url);
    else document.body.append(make("iframe", "wxscan-phone", { src: url, title: words.phone }));
    document.querySelector("body > .wxscan-demo")?.remove();
    document.querySelector("main").after(link);
  }

  // follow polls until the ticket is done or expired, and returns the answer: only
  // while somebody can see the page, and at once when it is seen again. It bears a
  // lost connection, with ever longer pauses.
  async function follow(qr, box, signal, again) {
    let deadline = Date.now() + qr.expiresIn * 1000;
    box.tick(deadline);
    const ticking = setInterval(() => box.tick(deadline), 1000);
    let prompt = [box.status.textContent, box.hint.textContent];
    let seen = "pending";
    try {
      for (let pause = 1000, wait = 25; ;) {
        await shown(signal);
        if (signal.aborted) return {};
        const asked = Date.now();
        try {
          const answer = await poll(qr.ticket, signal, `&wait=${wait}&status=${seen}`, true);
          if (signal.aborted || (answer.status !== "pending" && answer.status !== "scanned")) return answer;
          deadline = Date.now() + answer.expiresIn * 1000;
          pause = 1000;
          wait = 25;
          if (answer.status !== seen) {
            seen = answer.status;
            box.scanned(answer, again);
            box.tick(deadline);
            prompt = [words.scanned];
            continue;
          }
          box.say(...prompt);
          if (Date.now() - asked < 1000) await sleep(1000, signal); // the server is going down
        } catch (err) {
          if (signal.aborted) return {};
          if (err.code === "hidden") continue;
          if (Date.now() > deadline) return { status: "expired" };
          box.say(words[err.code] || words.error);
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
  async function leave(box, signal, another) {
    const ticket = sessionStorage.getItem("wxscan");
    if (ticket) {
      const answer = await poll(ticket, signal);
      sessionStorage.removeItem("wxscan");
      sessionStorage.removeItem("wxscan-page");
      if (answer.login) return answer;
      await box.stop(signal, words.unfinished, words.retry, another);
    }
    const qr = await ask("/wechat/getauthqr", signal);
    sessionStorage.setItem("wxscan", qr.ticket);
    sessionStorage.setItem("wxscan-page", location.href);
    location.assign(qr.url);
    return new Promise(() => {});
  }

  // welcome shows who is logged in, and returns where to go from there, if anywhere.
  function welcome(element, box, who) {
    const { returnTo } = element.dataset;
    const target = returnTo && new URL(returnTo, location);
    const safe = target && target.origin === location.origin && target;
    const logOut = async () => {
      await fetch(base + "/wechat/logout", { method: "POST" });
      delete element.dataset.openid;
      start(element);
    };
    box.who(who, !isOurs ? [] : [safe && make("a", "wxscan-main", { href: safe, textContent: words.goOn }),
      button("wxscan-button", words.logOut, () => logOut().catch(() => box.say(words.error)))]);
    return safe;
  }

  async function logIn(element, box, offered, at, signal) {
    for (let answer, renewed = 0, failed = 0; !signal.aborted;) {
      const way = ways[offered[at]];
      const another = offered.length > 1 && button("wxscan-link", words.another, () => start(element, at + 1));
      try {
        if (!renewed) box.look("wxscan-loading", [], []); // else the old code stays until the new one is there
        box.say(words.loading);
        if (inWeChat && way === ways.auth) {
          answer = await leave(box, signal, another);
        } else {
          const qr = await ask(way.begin, signal);
          if (signal.aborted) return;
          await box.show(qr, way, failed ? words.instead : "", another);
          answer = await follow(qr, box, signal, () => start(element, at));
        }
      } catch (err) {
        if (signal.aborted) return;
        if (String(err.code).startsWith("wechat_") && ++failed < offered.length) {
          at = (at + 1) % offered.length;
          continue;
        }
        renewed = failed = 0;
        const pressed = box.stop(signal, words[err.code] || words.error, words.retry, another);
        await (err.code === "lost" ? Promise.race([pressed, sleep(15e3, signal)]) : pressed);
        continue;
      }
      if (signal.aborted) return;
      if (answer.login) {
        const target = welcome(element, box, answer);
        element.dispatchEvent(new CustomEvent("wxscan:login", { bubbles: true, detail: answer }));
        if (target) location.assign(target);
        return;
      }
      if (answer.status === "declined") {
        await box.stop(signal, words.declined, words.retry, another);
        continue;
      }
      const pressed = box.stop(signal, words.expired, words.refresh, another, true);
      if (++renewed > 3) { // nobody seems to be there
        await pressed;
        renewed = 1;
      }
    }
  }

  // start begins a login anew: in the way that is number at, or in the one that
  // suits, for a link can be opened where nothing can be scanned.
  const running = new WeakMap();
  function start(element, at) {
    const offered = (element.dataset.wxscan || "").split(",").filter((name) => name in ways);
    if (!offered.length) offered.push("scan");
    at ??= onPhone || inWeChat ? Math.max(0, offered.indexOf("auth")) : 0;
    const { box, control } = running.get(element) || { box: new Box(element), control: new AbortController() };
    control.abort();
    const next = new AbortController();
    running.set(element, { box, control: next });
    if (element.dataset.openid) welcome(element, box, element.dataset);
    else logIn(element, box, offered, at % offered.length, next.signal);
  }

  // own shows the number of the ticket that this tab left with: whoever is
  // inside WeChat has no other page in front of them.
  async function own(element) {
    const { number } = await poll(sessionStorage.getItem("wxscan"), new AbortController().signal).catch(() => ({}));
    if (!number) return;
    element.lastElementChild.textContent = number;
    element.hidden = false;
  }

  // Our own pages.
  function page() {
    document.documentElement.lang = language;
    document.title = document.querySelector("h1").innerText;
    const choice = make("nav", "wxscan-languages", { ariaLabel: "语言 Language" });
    for (const [lang, textContent] of Object.entries(languages)) {
      choice.append(make("button", "", { type: "button", lang, textContent, ariaPressed: lang === language, onclick: () => {
        document.cookie = `wxscan_language=${lang}; path=/; max-age=31536000; samesite=lax`;
        location.reload();
      } }));
    }
    if (self === top) document.body.append(choice);
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
  }

  function run() {
    if (isOurs) page();
    const style = base + "/static/wxscan.css";
    if (document.querySelector("[data-wxscan]") && ![...document.styleSheets].some((sheet) => sheet.href === style)) {
      document.head.append(make("link", "", { rel: "stylesheet", href: style }));
    }
    document.querySelectorAll("[data-wxscan]").forEach((element) => start(element));
  }
  if (document.readyState === "loading") addEventListener("DOMContentLoaded", run);
  else run();
})();
