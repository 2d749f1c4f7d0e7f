package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const checkUsage = `wxscan check: say what is wrong with the set-up, how to mend it, what to enter where;
run it while the server runs, with the same settings
  -json             a JSON object a line
  -demo             check a wxscan -demo that runs here
and the settings, by flag or environment:
`

const checkUsageInChinese = `wxscan check：检查各项配置：哪里不对、怎么改、在哪里填什么
请在服务运行时，用同样的设置运行
  -json             每行输出一个 JSON 对象
  -demo             检查本机正在运行的 wxscan -demo
以及下列设置，可用选项或环境变量：
`

// A doctor checks the set-up, and prints a line for each step. No line holds a
// secret; text that others have written is quoted, as it may hold anything.
type doctor struct {
	config   config
	language language
	wechat   *wechat
	out      io.Writer
	asJSON   bool
	failed   bool
	broken   string // the letters of the flows that do not work
}

// report prints a line: ✓ or ✗; – for what was not tried; → for what to enter on the
// account's page, which cannot be checked.
func (d *doctor) report(step, mark, english, chinese string, args ...any) {
	message := d.language.sprintf(english, chinese, args...)
	if !d.asJSON {
		fmt.Fprintln(d.out, mark, message)
		return
	}
	encoder := json.NewEncoder(d.out)
	encoder.SetEscapeHTML(false)
	encoder.Encode(object{"step": step, "ok": mark != "✗", "skipped": mark == "–", "message": message})
}

// bad reports a fault. broken has the letters of the flows that it breaks.
func (d *doctor) bad(step, broken, english, chinese string, args ...any) {
	d.failed = true
	d.broken += broken
	d.report(step, "✗", english, chinese, args...)
}

// check checks the set-up, beside a server that runs already.
func check(ctx context.Context, args []string, getenv func(string) string, stdout io.Writer) error {
	l := languageOf(getenv)
	d := &doctor{language: l, out: stdout}
	flags := flag.NewFlagSet("check", flag.ContinueOnError)
	flags.BoolVar(&d.asJSON, "json", false, "")
	err := d.config.parse(flags, args, getenv)
	verdict := l.errorf("check: not everything is in place", "check：配置尚有问题")
	if wrong, ok := errors.AsType[*settingsError](err); ok {
		for _, line := range wrong.lines {
			d.bad("settings", "", "%s", "%s", line)
		}
		d.report("others", "–", "not tried, for want of settings: all the rest",
			"设置有误，其余各项未检查")
		return verdict
	}
	if err != nil {
		return err
	}
	if d.config.demo {
		d.config.simulate(d.config.addr)
	}
	d.wechat = newWeChat(&d.config, slog.New(slog.DiscardHandler))
	d.report("settings", "✓", "the settings are complete and well-formed", "设置齐全，格式正确")
	switch isThere := d.clock(ctx); {
	case d.config.appSecret == "": // for flow C, WeChat's API is not needed
	case isThere:
		d.account(ctx)
	default:
		d.report("access_token", "–",
			"not tried, as WeChat does not answer: whether it gives access tokens and QR codes",
			"微信没有应答，未检查能否取得 access token 和二维码")
	}
	d.interfaceURL(ctx)
	d.port()
	d.toEnter()
	d.flows()
	if d.failed {
		return verdict
	}
	return nil
}

// clock compares the clocks. It is false if WeChat does not answer.
func (d *doctor) clock(ctx context.Context) bool {
	api := originOf(d.config.apiBase)
	resp, _, err := sendAsWeChat(ctx, d.wechat.client, http.MethodGet, d.config.apiBase+"/", nil)
	if err != nil {
		d.trouble("clock", "AB", err, api)
		return false
	}
	date, err := http.ParseTime(resp.Header.Get("Date"))
	apart := time.Since(date).Abs()
	switch {
	case err != nil:
		d.bad("clock", "", "%s does not tell the time: is that WeChat, or a proxy to it?",
			"%s 的应答没有时间：那是微信或其代理吗？", api)
	case apart > 5*time.Minute || d.config.maxSkew > 0 && apart > d.config.maxSkew:
		d.bad("clock", "AC", "this computer's clock and WeChat's are %v apart: set it right "+
			"(timedatectl set-ntp true); PUSH_MAX_SKEW bears %v",
			"本机时钟与微信相差 %v：请校准（timedatectl set-ntp true）；PUSH_MAX_SKEW 容许 %v",
			apart.Round(time.Minute), d.config.maxSkew)
	default:
		d.report("clock", "✓", "this computer's clock agrees with WeChat's", "本机时钟与微信一致")
	}
	return true
}

// account tries what flow A needs of the account.
func (d *doctor) account(ctx context.Context) {
	api := originOf(d.config.apiBase)
	if _, err := d.wechat.accessToken(ctx); err != nil {
		d.trouble("access_token", brokenBy(err), err, api)
		d.report("qr_code", "–", "not tried, for want of an access token: whether WeChat makes QR codes",
			"没有 access token，未检查能否生成带参数二维码")
		return
	}
	d.report("access_token", "✓", "WeChat gives an access token for this appid and appsecret",
		"微信接受此 appid 和 appsecret，已取得 access token")
	if _, _, err := d.wechat.createQR(ctx, rand.Text(), time.Minute); err != nil {
		d.trouble("qr_code", brokenBy(err), err, api)
		return
	}
	d.report("qr_code", "✓", "WeChat makes QR codes for this account (flow A)",
		"此公众号可以生成带参数二维码（方式 A）")
}

// brokenBy returns the flows that cannot work when a call of flow A fails with err.
func brokenBy(err error) string {
	if errors.Is(err, errRefused) && kindOf(err) != kindAccount {
		return "A"
	}
	return "AB" // flow B needs the account too, and a WeChat that answers
}

// trouble reports why a call failed, whether to WeChat or to our own address.
func (d *doctor) trouble(step, broken string, err error, at *url.URL) {
	refused, isRefused := errors.AsType[*apiError](err)
	_, isDNS := errors.AsType[*net.DNSError](err)
	_, isCert := errors.AsType[*tls.CertificateVerificationError](err)
	netErr, isNet := errors.AsType[net.Error](err)
	switch {
	case isRefused:
		d.refusal(step, broken, refused)
	case isDNS:
		d.bad(step, broken, "%s: DNS does not know this name: is it spelt right, and this machine online?",
			"%s：域名无法解析：拼写对吗？本机能上网吗？", at)
	case isCert:
		d.bad(step, broken, "%s: its certificate is not trusted, or not for this name, or has expired: "+
			"get one that browsers accept (certbot, Caddy)",
			"%s：证书不受信任、域名不符或已过期："+
				"请换用浏览器认可的证书（certbot、Caddy）", at)
	case errors.Is(err, errTimeout) || isNet && netErr.Timeout():
		d.bad(step, broken, "%s: no answer in time: "+
			"does a firewall or a security group (安全组) keep the port shut?",
			"%s：超时没有应答：端口被防火墙或安全组挡住了吗？", at)
	case errors.Is(err, syscall.ECONNREFUSED):
		d.bad(step, broken, "%s: connection refused: the server must be running, on that port, while check runs",
			"%s：连接被拒绝：运行 check 时，服务须已在该端口运行", at)
	default:
		d.bad(step, broken, "%s: no usable answer (%q): is the address right, is it http or https, is a proxy between?",
			"%s：应答无法使用（%q）：地址对吗？是 http 还是 https？中间有代理吗？", at, err)
	}
}

func (d *doctor) refusal(step, broken string, err *apiError) {
	kind, english, chinese := meaning(err)
	ip, noIP := netip.ParseAddr(regexp.MustCompile(`(\d+\.){3}\d+|[0-9a-f]*(:[0-9a-f.]*){2,}`).FindString(err.message))
	switch {
	case kind == kindIP && noIP == nil:
		d.bad(step, broken, "errcode %d: add %s to the account's IP whitelist: "+
			"mp.weixin.qq.com, 设置与开发, 基本配置, "+
			"IP白名单; flow B works without",
			"errcode %d：请把 %s 加入公众号的 IP 白名单：mp.weixin.qq.com → 设置与开发 → "+
				"基本配置 → IP白名单；方式 B 不受影响", err.code, ip.Unmap())
	case english == "":
		d.bad(step, broken, "errcode %d: look it up among WeChat's return codes (全局返回码)",
			"errcode %d：请查微信的全局返回码", err.code)
	default:
		d.bad(step, broken, "errcode %d: "+english, "errcode %d："+chinese, err.code)
	}
}

// interfaceURL does what WeChat does when somebody enters the interface URL.
func (d *doctor) interfaceURL(ctx context.Context) {
	const step = "public_url"
	query, echo, us := d.config.signedQuery(), rand.Text(), originOf(d.config.publicURL)
	query.Set("echostr", echo)
	target := d.config.interfaceURL() + "?" + query.Encode()
	resp, body, err := sendAsWeChat(ctx, d.wechat.client, http.MethodGet, target, nil)
	if err != nil {
		d.trouble(step, "ABC", err, us)
		return
	}
	isHTML := strings.HasPrefix(resp.Header.Get("Content-Type"), "text/html")
	next, noNext := resp.Location()
	status := resp.StatusCode
	isEcho := status == 200 && string(body) == echo
	switch {
	case status/100 == 3 && noNext == nil:
		next = &url.URL{Scheme: next.Scheme, Host: next.Host, Path: next.Path} // the rest has our signature
		d.bad(step, "ABC",
			"%s redirects to %q, and WeChat does not follow: make PUBLIC_URL the address that answers itself",
			"%s 跳转到 %q，而微信不会跟随：PUBLIC_URL 应为直接应答的地址", us, next)
	case isEcho && d.isProxied() && resp.Header.Get(forwardedHeader) == "missing":
		d.bad(step, "", "%s answers, but the proxy in front of it does not say who asks: have it send X-Forwarded-For "+
			"(nginx: proxy_set_header X-Forwarded-For $remote_addr), or QR_RATE takes all visitors for one",
			"%s 有应答，但前面的代理没有告知访问者是谁：请让它发送 X-Forwarded-For"+
				"（nginx：proxy_set_header X-Forwarded-For $remote_addr），"+
				"否则 QR_RATE 把所有访问者当成同一个", us)
	case isEcho:
		d.report(step, "✓", "%s answers WeChat's check of the interface URL",
			"%s 能通过微信对接口 URL 的验证", us)
	case status == 403 && strings.Contains(string(body), `"bad_signature"`):
		d.bad(step, "AC", "%s: wxscan answers, but has another Token: start it with this WECHAT_TOKEN",
			"%s：wxscan 的 Token 不同：请用此 WECHAT_TOKEN 启动它", us)
	case isHTML && (status == 200 || status == 511):
		d.bad(step, "ABC", "%s answers with a web page: a tunnel's warning (ngrok, localtunnel), which WeChat cannot "+
			"click away, or another program",
			"%s 返回的是网页：内网穿透的提示页"+
				"（ngrok 免费版、localtunnel，微信无法点过），或是别的程序", us)
	default:
		d.bad(step, "ABC", "%s: HTTP %d, but not from wxscan: does the proxy or tunnel pass /wechat/ on unchanged, "+
			"to where it runs? Is it https there?", "%s：HTTP %d，但应答的不是 wxscan："+
			"代理或内网穿透把 /wechat/ 原样转到它运行的端口了吗？"+
			"那里是 https 吗？", us, status)
	}
}

// isProxied tells whether the public port differs from the port we listen on.
func (d *doctor) isProxied() bool {
	us := originOf(d.config.publicURL)
	public := cmp.Or(us.Port(), map[string]string{"http": "80", "https": "443"}[us.Scheme])
	return strconv.Itoa(d.config.addr.Port) != public
}

// port checks whether WeChat would push to the public address. A simulator, which
// speaks http, pushes to any port.
func (d *doctor) port() {
	us := originOf(d.config.publicURL)
	ip, _ := netip.ParseAddr(us.Hostname())
	isPublic := us.Hostname() != "localhost" && !ip.IsLoopback() && !ip.IsPrivate()
	isSimulated := originOf(d.config.apiBase).Scheme != "https"
	if isPublic && slices.Contains([]string{"", "80", "443"}, us.Port()) || isSimulated {
		return
	}
	d.bad("public_port", "AC",
		"WeChat pushes to ports 80 and 443 of public addresses alone, and %s is none: "+
			"wxscan hears of no scan and no message",
		"微信只向公网地址的 80、443 端口推送，而 %s 不是：收不到扫码事件和消息", us)
}

func (d *doctor) toEnter() {
	d.report("interface", "→",
		"to enter as the interface URL (接口配置信息 URL): %s ; as its Token: the value of WECHAT_TOKEN",
		"请填写接口配置信息：URL 为 %s ，Token 为 WECHAT_TOKEN 的值", d.config.interfaceURL())
	if d.config.shortToken() && !d.config.demo {
		d.report("token", "→", "to make longer, here and there: WECHAT_TOKEN, short enough to be guessed; "+
			"16 characters are enough (openssl rand -hex 16)",
			"请加长两处的 WECHAT_TOKEN：太短，可能被猜出；"+
				"16 个字符以上为宜（openssl rand -hex 16）")
	}
	if d.config.aesKey != nil {
		d.report("safe_mode", "→",
			"to choose and enter there: safe mode (安全模式), as EncodingAESKey the value of WECHAT_AES_KEY",
			"并选择安全模式，EncodingAESKey 为 WECHAT_AES_KEY 的值")
	}
	if d.config.appSecret == "" {
		return
	}
	d.report("authorization", "→", "to enter as the authorization domain (网页授权域名): %s",
		"请填写网页授权域名：%s", d.config.domain())
}

// flows gives the verdict on each flow.
func (d *doctor) flows() {
	verdict := func(letter, more, moreInChinese string) {
		step := "flow_" + strings.ToLower(letter)
		if strings.Contains(d.broken, letter) {
			d.report(step, "✗", "%s: not ready, see above", "方式 %s：未就绪，见上文", letter)
			return
		}
		d.report(step, "✓", letter+": ready"+more, "方式 "+letter+"：就绪"+moreInChinese)
	}
	if d.config.appSecret != "" {
		verdict("A", "", "")
		verdict("B", ", but only a phone can try the domain", "，但授权域名只能用手机验证")
	}
	if d.config.offers(flowCode) {
		verdict("C", "", "")
	}
}
