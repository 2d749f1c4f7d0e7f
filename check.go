package main

import (
	"cmp"
	"context"
	"crypto/rand"
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
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"
)

// command runs a command other than serving. It returns flag.ErrHelp if help is
// what is wanted.
func command(ctx context.Context, args []string, getenv func(string) string, stdout io.Writer) error {
	switch args[0] {
	case "check":
		return check(ctx, args[1:], getenv, stdout)
	case "sign":
		return sign(args[1:], getenv, stdout)
	case "version":
		if info, ok := debug.ReadBuildInfo(); ok { // go build takes the version from git
			fmt.Fprintln(stdout, "wxscan", cmp.Or(info.Main.Version, "(devel)"), info.GoVersion)
		}
		return nil
	case "help":
		return flag.ErrHelp
	}
	return unknown("command", args[0], "check", "sign", "version", "help")
}

// interfaceURL is where WeChat is to send its pushes.
func (c *config) interfaceURL() string { return c.publicURL + "/wechat/message" }

// shortToken tells whether the Token could be guessed by asking.
func (c *config) shortToken() bool { return len(c.token) < 16 }

// domain is where the authorize page may send phones back to: a bare host.
func (c *config) domain() string { return site(c.publicURL).Hostname() }

// site returns the scheme and the host of an address, without the rest, where
// secrets may be. It is never nil.
func site(address string) *url.URL {
	u, _ := url.Parse(address)
	u = cmp.Or(u, new(url.URL))
	return &url.URL{Scheme: u.Scheme, Host: u.Host}
}

// A finding is a line of check's: ✓ or ✗, or → before what is to be entered,
// which cannot be checked; and its text, in English and in Chinese.
type finding struct{ mark, english, chinese string }

// say returns a finding, if that is so, else none. No argument is a secret; text
// that somebody else has written is quoted, as it may hold anything.
func say(is bool, mark, english, chinese string, args ...any) finding {
	if !is {
		return finding{}
	}
	return finding{mark, fmt.Sprintf(english, args...), fmt.Sprintf(chinese, args...)}
}

// check walks the set-up, and prints a line a step. It starts no server.
func check(ctx context.Context, args []string, getenv func(string) string, stdout io.Writer) error {
	settings := slices.DeleteFunc(slices.Clone(args), func(arg string) bool { return arg == "-json" || arg == "--json" })
	asJSON, chinese := len(settings) < len(args), strings.HasPrefix(cmp.Or(getenv("LC_ALL"), getenv("LANG")), "zh")
	var verdict error
	report := func(step string, findings ...finding) { // the first of them, if any
		f := cmp.Or(findings...)
		message := map[bool]string{false: f.english, true: f.chinese}[chinese]
		switch {
		case f.mark == "":
		case asJSON:
			json.NewEncoder(stdout).Encode(object{"step": step, "ok": f.mark != "✗", "message": message})
		default:
			fmt.Fprintln(stdout, f.mark, message)
		}
		if f.mark == "✗" {
			verdict = errors.New("check: not everything is in place")
		}
	}

	c, err := parseConfig(settings, getenv, io.Discard)
	if errors.Is(err, flag.ErrHelp) {
		return err
	}
	if err == nil && c.demo { // one that runs here already
		var listening *net.TCPAddr
		if listening, err = net.ResolveTCPAddr("tcp", c.addr); err == nil {
			c.simulate(listening)
		}
	}
	if err != nil {
		report("settings", finding{"✗", err.Error(), strings.NewReplacer(zhSettings...).Replace(err.Error())})
		return verdict
	}
	report("settings", say(true, "✓", "the settings are complete and well-formed", "设置齐全，格式正确"))

	w := newWeChat(&c, slog.New(slog.DiscardHandler))
	api, us := site(c.apiBase), site(c.publicURL)
	resp, _, err := sendAsWeChat(ctx, w.client, http.MethodGet, c.apiBase+"/", nil)
	date, noDate := http.ParseTime(cmp.Or(resp, new(http.Response)).Header.Get("Date"))
	apart := time.Since(date).Abs()
	report("clock", trouble(err, api),
		say(noDate != nil, "✗", "%s does not tell the time: is that WeChat, or a proxy to it?", "%s 的应答没有时间：那是微信或其代理吗？", api),
		say(apart > 5*time.Minute || c.maxSkew > 0 && apart > c.maxSkew, "✗",
			"this computer's clock and WeChat's are %v apart: set it right (timedatectl set-ntp true); PUSH_MAX_SKEW bears %v",
			"本机时钟与微信相差 %v：请校准（timedatectl set-ntp true）；PUSH_MAX_SKEW 容许 %v", apart.Round(time.Minute), c.maxSkew),
		say(true, "✓", "this computer's clock agrees with WeChat's", "本机时钟与微信一致"))
	if err == nil { // else the next steps would say the same
		_, err = w.accessToken(ctx)
		report("access_token", trouble(err, api),
			say(true, "✓", "WeChat gives an access token for this appid and appsecret", "微信接受此 appid 和 appsecret，已取得 access token"))
	}
	if err == nil {
		_, _, err = w.createQR(ctx, rand.Text(), time.Minute)
		report("qr_code", trouble(err, api),
			say(true, "✓", "WeChat makes QR codes for this account (flow A)", "此公众号可以生成带参数二维码（方式 A）"))
	}
	report("public_url", urlCheck(ctx, w.client, &c))
	ip, _ := netip.ParseAddr(us.Hostname())
	isOpen := us.Hostname() != "localhost" && !ip.IsLoopback() && !ip.IsPrivate() && slices.Contains([]string{"", "80", "443"}, us.Port())
	// A simulator speaks http, and pushes to any port.
	report("public_port", say(!isOpen && api.Scheme == "https", "✗",
		"WeChat pushes to ports 80 and 443 of public addresses alone, and %s is none: flow A hears of no scan",
		"微信只向公网地址的 80、443 端口推送，而 %s 不是：方式 A 收不到扫码事件", us))
	report("interface", say(true, "→", "to enter as the interface URL (接口配置信息 URL): %s ; as its Token: the value of WECHAT_TOKEN",
		"请填写接口配置信息：URL 为 %s ，Token 为 WECHAT_TOKEN 的值", c.interfaceURL()))
	report("token", say(c.shortToken() && !c.demo, "→", "to make longer, here and there: WECHAT_TOKEN, short enough to be guessed; 16 characters are enough (openssl rand -hex 16)",
		"请加长两处的 WECHAT_TOKEN：太短，可能被猜出；16 个字符以上为宜（openssl rand -hex 16）"))
	report("safe_mode", say(c.aesKey != nil, "→", "to choose and enter there: safe mode (安全模式), as EncodingAESKey the value of WECHAT_AES_KEY",
		"并选择安全模式，EncodingAESKey 为 WECHAT_AES_KEY 的值"))
	report("authorization", say(true, "→", "to enter as the authorization domain (网页授权域名), which only a phone can try (flow B): %s",
		"请填写网页授权域名（方式 B，只有用手机才能验证）：%s", c.domain()))
	return verdict
}

// trouble tells what WeChat, or the way to a server, has against a call; nothing
// if there is no error.
func trouble(err error, at *url.URL) finding {
	if refused, ok := errors.AsType[*apiError](err); ok {
		kind, english, chinese := sorted(err)
		ip, noIP := netip.ParseAddr(regexp.MustCompile(`(\d+\.){3}\d+|[0-9a-f]*(:[0-9a-f.]*){2,}`).FindString(refused.message))
		return cmp.Or(
			say(kind == kindIP && noIP == nil, "✗",
				"errcode %d: add %s to the account's IP whitelist: mp.weixin.qq.com, 设置与开发, 基本配置, IP白名单; flow B works without",
				"errcode %d：请把 %s 加入公众号的 IP 白名单：mp.weixin.qq.com → 设置与开发 → 基本配置 → IP白名单；方式 B 不受影响", refused.code, ip.Unmap()),
			say(english != "", "✗", "errcode %d: "+english, "errcode %d："+chinese, refused.code),
			say(true, "✗", "errcode %d: look it up among WeChat's return codes (全局返回码)", "errcode %d：请查微信的全局返回码", refused.code))
	}
	_, isDNS := errors.AsType[*net.DNSError](err)
	netErr, isNet := errors.AsType[net.Error](err)
	return cmp.Or(
		say(isDNS, "✗", "%s: DNS does not know this name: is it spelt right, and this machine online?", "%s：域名无法解析：拼写对吗？本机能上网吗？", at),
		say(errors.Is(err, errTimeout) || isNet && netErr.Timeout(), "✗",
			"%s: no answer in time: does a firewall or a security group (安全组) keep the port shut?", "%s：超时没有应答：端口被防火墙或安全组挡住了吗？", at),
		say(errors.Is(err, syscall.ECONNREFUSED), "✗",
			"%s: connection refused: the server must be running, on that port, while check runs", "%s：连接被拒绝：运行 check 时，服务须已在该端口运行", at),
		say(err != nil, "✗", "%s: no usable answer (%q): is the address right, http or https, the certificate good, no proxy between?",
			"%s：应答无法使用（%q）：地址对吗？是 http 还是 https？证书可信吗？中间有代理吗？", at, err))
}

// urlCheck does what WeChat does when the interface URL is entered.
func urlCheck(ctx context.Context, client *http.Client, c *config) finding {
	query, echo, us := c.signedQuery(), rand.Text(), site(c.publicURL)
	query.Set("echostr", echo)
	resp, body, err := sendAsWeChat(ctx, client, http.MethodGet, c.interfaceURL()+"?"+query.Encode(), nil)
	if err != nil {
		return trouble(err, us)
	}
	answer, status := string(body), resp.StatusCode
	if target, err := resp.Location(); err == nil && status/100 == 3 { // of its query we keep nothing: it holds our signature
		return say(true, "✗", "%s redirects to %q, and WeChat does not follow: make PUBLIC_URL the address that answers itself",
			"%s 跳转到 %q，而微信不会跟随：PUBLIC_URL 应为直接应答的地址", us, &url.URL{Scheme: target.Scheme, Host: target.Host, Path: target.Path})
	}
	_, listens, _ := net.SplitHostPort(c.addr)
	isProxied := listens != cmp.Or(us.Port(), map[string]string{"http": "80", "https": "443"}[us.Scheme])
	isPage := (status == 200 || status == 511) && strings.HasPrefix(resp.Header.Get("Content-Type"), "text/html")
	return cmp.Or(
		say(status == 200 && answer == echo && isProxied && resp.Header.Get(forwardedHeader) == "missing", "✗",
			"%s answers, but the proxy in front of it does not say who asks: have it send X-Forwarded-For (nginx: proxy_set_header X-Forwarded-For $remote_addr), or QR_RATE takes all visitors for one",
			"%s 有应答，但前面的代理没有告知访问者是谁：请让它发送 X-Forwarded-For（nginx：proxy_set_header X-Forwarded-For $remote_addr），否则 QR_RATE 把所有访问者当成同一个", us),
		say(status == 200 && answer == echo, "✓", "%s answers WeChat's check of the interface URL", "%s 能通过微信对接口 URL 的验证", us),
		say(status == 403 && strings.Contains(answer, `"bad_signature"`), "✗",
			"%s: wxscan answers, but has another Token: start it with this WECHAT_TOKEN", "%s：wxscan 的 Token 不同：请用此 WECHAT_TOKEN 启动它", us),
		say(isPage, "✗", "%s answers with a web page: a tunnel's warning (ngrok, localtunnel), which WeChat cannot click away, or another program",
			"%s 返回的是网页：内网穿透的提示页（ngrok 免费版、localtunnel，微信无法点过），或是别的程序", us),
		say(true, "✗", "%s: HTTP %d, but not from wxscan: does the proxy or tunnel pass /wechat/ on unchanged, to where it runs? Is it https there?",
			"%s：HTTP %d，但应答的不是 wxscan：代理或内网穿透把 /wechat/ 原样转到它运行的端口了吗？那里是 https 吗？", us, status))
}

// sign prints curl lines that the server takes for WeChat's: the check of the
// interface URL and, for a ticket, the push that logs it in. They go to this
// machine, or to PUBLIC_URL if the server listens on a socket or with TLS.
func sign(args []string, getenv func(string) string, stdout io.Writer) error {
	flags := flag.NewFlagSet("sign", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	ticket := flags.String("ticket", "", "")
	openID := flags.String("openid", "", "")
	event := flags.String("event", "SCAN", "")
	if err := flags.Parse(args); err != nil {
		return badFlag(err, flags)
	}
	c := config{appID: getenv("WECHAT_APPID"), token: getenv("WECHAT_TOKEN"), publicURL: strings.TrimSuffix(getenv("PUBLIC_URL"), "/")}
	if listening, err := net.ResolveTCPAddr("tcp", cmp.Or(getenv("ADDR"), ":8080")); err == nil && getenv("TLS_CERT") == "" {
		c.publicURL = fmt.Sprint("http://127.0.0.1:", listening.Port)
	}
	scene := digest(*ticket).String()
	eventKey := map[string]string{"SCAN": scene, "subscribe": "qrscene_" + scene}[*event]
	var keyErr error
	if key := getenv("WECHAT_AES_KEY"); key != "" {
		c.aesKey, keyErr = parseAESKey(key)
	}
	for _, wrong := range []struct {
		is   bool
		says string
	}{
		{flags.NArg() > 0, "unknown argument (wxscan -h lists the flags)"},
		{c.token == "", "WECHAT_TOKEN is not set: it must be the server's; that of wxscan -demo is simulated"},
		{keyErr != nil, "WECHAT_AES_KEY is malformed: it must be the server's"},
		{c.aesKey != nil && c.appID == "", "WECHAT_APPID is not set: what WECHAT_AES_KEY seals names it"},
		{c.publicURL == "", "PUBLIC_URL is not set: it must be the server's"},
		{eventKey == "", "-event must be SCAN or subscribe"},
		{(*ticket == "") != (*openID == ""), "-ticket and -openid go together, and neither is empty"},
	} {
		if wrong.is {
			return errors.New("sign: " + wrong.says)
		}
	}
	quote := func(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
	query := c.signedQuery()
	query.Set("echostr", rand.Text())
	fmt.Fprintf(stdout, "curl -sS -w '\\n' %s\n", quote(c.interfaceURL()+"?"+query.Encode()))
	if *ticket == "" {
		return nil
	}
	query, push, err := c.signedPush(*openID, *event, eventKey, "")
	fmt.Fprintf(stdout, "curl -sS -w '\\n' %s -H 'Content-Type: text/xml' --data-binary %s\n", quote(c.interfaceURL()+"?"+query.Encode()), quote(string(push)))
	return err
}

// badFlag makes plain what flag.Parse has against the arguments.
func badFlag(err error, flags *flag.FlagSet) error {
	word, ok := strings.CutPrefix(err.Error(), "flag provided but not defined: ")
	if !ok {
		return fmt.Errorf("%w (wxscan -h lists the flags)", err)
	}
	known := []string{"-json"} // of check, which hides it from flags
	flags.VisitAll(func(f *flag.Flag) { known = append(known, "-"+f.Name) })
	return unknown("flag", word, known...)
}

// unknown says which known word was meant, if one is near.
func unknown(kind, word string, known ...string) error {
	nearest := slices.MinFunc(known, func(a, b string) int { return distance(word, a) - distance(word, b) })
	if d := distance(word, nearest); 0 < d && d <= 2 && 2*d <= len(word) {
		return fmt.Errorf("unknown %s %q: did you mean %s?", kind, word, nearest)
	}
	return fmt.Errorf("unknown %s %q (wxscan -h lists them)", kind, word)
}

// distance is the length of the longer word without the beginning and the end
// that both share.
func distance(a, b string) int {
	for a != "" && b != "" && a[0] == b[0] {
		a, b = a[1:], b[1:]
	}
	for a != "" && b != "" && a[len(a)-1] == b[len(b)-1] {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	return max(len(a), len(b))
}

// zhSettings has the commonest words of parseConfig's errors, each with its Chinese.
var zhSettings = []string{
	" is not set: it is ", " 未设置：应为", " is malformed: it is ", " 格式不对：应为",
	"; without an account, try wxscan -demo", "；没有公众号可先试 wxscan -demo",
	" on the account's page (test account: ", "，见公众号页面（测试号：",
	"the appID (wx and letters and digits)", " appID（wx 加字母和数字）",
	"the appsecret (letters and digits)", " appsecret（字母和数字）",
	"the Token (3-32 letters and digits) that you make up and type into the interface configuration (接口配置信息)", "您自定并填入接口配置信息的 Token（3 到 32 个字母和数字）",
	"http(s)://host[:port] without a path, where phones reach us", " http(s)://域名[:端口]，不带路径，即手机和微信访问本服务的地址，如 ngrok 给的地址",
}
