// Wxscan lets people log in to a web page by scanning a QR code with WeChat.
//
// It is one program with no database. It talks to one WeChat Official Account
// (公众号; a free test account, 测试号, is enough) and keeps everything in memory.
// With REDIS_URL, several programs share what they know. wxscan -h lists the
// commands, the flags and the environment variables.
//
// There are three ways to log in. In flow A the browser shows a parametric QR code
// made by WeChat, and WeChat pushes the scan to us. In flow B it shows the QR
// code of WeChat's web authorization page, and the phone brings us a code that
// says who it is. In flow C it shows six digits, which people send to the account
// as a message. In all of them, the browser holds a secret ticket and asks
// /wechat/checklogin until somebody has logged in.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	stdlog "log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"regexp"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	readTimeout   = 20 * time.Second // of a whole request, its body included
	shutdownGrace = 5 * time.Second  // for the requests in flight
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	stdlog.SetOutput(io.Discard) // net/http's client would quote unexpected answers there
	if err := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "wxscan:", strings.ReplaceAll(err.Error(), "\n", "\nwxscan: "))
		os.Exit(1)
	}
}

// A language is the one in which wxscan answers on the command line. The log is in
// English.
type language bool

const inChinese language = true

func languageOf(getenv func(string) string) language {
	return language(strings.HasPrefix(cmp.Or(getenv("LC_ALL"), getenv("LC_MESSAGES"), getenv("LANG")), "zh"))
}

func (l language) choose(english, chinese string) string {
	if l == inChinese {
		return chinese
	}
	return english
}

func (l language) sprintf(english, chinese string, args ...any) string {
	return fmt.Sprintf(l.choose(english, chinese), args...)
}

func (l language) errorf(english, chinese string, args ...any) error {
	return errors.New(l.sprintf(english, chinese, args...))
}

const usage = `wxscan: log in to a web page by scanning a QR code with WeChat
  wxscan -demo      try it on http://127.0.0.1:8080, with a simulated WeChat; needs nothing
  wxscan            serve; needs WECHAT_APPID, WECHAT_APPSECRET, WECHAT_TOKEN and PUBLIC_URL
  wxscan check      say what is wrong with the set-up, how to mend it, what to enter where
  wxscan sign       print WeChat's requests, as curl lines
  wxscan version    or -version
check -h and sign -h say what these take. Flags, and the environment where a flag is not given:
  -demo             simulate WeChat: anyone can log in as anyone
`

const usageInChinese = `wxscan：用微信扫码登录网页
  wxscan -demo      在 http://127.0.0.1:8080 试用，微信为模拟，无需任何设置
  wxscan            启动服务，须设置 WECHAT_APPID、WECHAT_APPSECRET、WECHAT_TOKEN 和 PUBLIC_URL
  wxscan check      检查各项配置：哪里不对、怎么改、在哪里填什么
  wxscan sign       以 curl 命令的形式打印微信会发来的请求
  wxscan version    显示版本，也可用 -version
check 和 sign 的选项见 check -h、sign -h。选项如下，未给出时取环境变量：
  -demo             模拟微信：任何人都能以任何身份登录
`

// help returns what a command answers to -h.
func help(l language, command string) string {
	text := ""
	switch command {
	case "check":
		text = l.choose(checkUsage, checkUsageInChinese) + settingsHelp(l)
	case "sign":
		text = l.choose(signUsage, signUsageInChinese)
	default:
		text = l.choose(usage, usageInChinese) + settingsHelp(l)
	}
	return text + l.choose("README.md, beside the source, has more: the set-up step by step, examples, deployment.\n",
		"更多内容（逐步设置、接入示例、部署）见源码目录中的 README.zh-CN.md。\n")
}

// settingsHelp has a line for each setting.
func settingsHelp(l language) string {
	var flags, others strings.Builder
	fmt.Fprintln(&flags, l.choose(
		"  -env              a file of lines NAME=value, for what the environment does not set",
		"  -env              设置文件，每行 NAME=value，用于环境变量中没有的设置"))
	fmt.Fprintln(&others, l.choose("By environment, or -env, alone:", "以下只能用环境变量或 -env 设置："))
	for _, s := range new(config).settings() {
		line := fmt.Sprintf("%-18s %s", s.env, l.choose(s.english, s.chinese))
		switch {
		case s.flag == "":
			fmt.Fprintf(&others, "  %s\n", line)
		case s.byDefault == "":
			fmt.Fprintf(&flags, "  -%-15s %s\n", s.flag, line)
		default:
			fmt.Fprintf(&flags, "  -%-15s %s [%s]\n", s.flag, line, s.byDefault)
		}
	}
	return flags.String() + others.String()
}

// run serves until ctx ends, or runs another command. It returns an error, which may
// have several lines, if it cannot start or if check finds a fault.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) (err error) {
	l, command := languageOf(getenv), "-"
	if len(args) > 0 {
		command = args[0]
	}
	switch command {
	case "check":
		err = check(ctx, args[1:], getenv, stdout)
	case "sign":
		err = sign(args[1:], getenv, stdout)
	case "version", "-version", "--version":
		if info, ok := debug.ReadBuildInfo(); ok { // go build takes the version from git
			fmt.Fprintln(stdout, "wxscan", cmp.Or(info.Main.Version, "(devel)"), info.GoVersion)
		}
	case "help":
		err = flag.ErrHelp
	default:
		if !strings.HasPrefix(command, "-") {
			return l.errorf("unknown command %q: there are check, sign, version and help",
				"未知命令 %q：可用的有 check、sign、version 和 help", command)
		}
		err = runServer(ctx, args, getenv, stdout, stderr)
	}
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(stdout, help(l, command))
		return nil
	}
	return err
}

func runServer(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	l := languageOf(getenv)
	c, err := parseConfig(args, getenv)
	if wrong, ok := errors.AsType[*settingsError](err); ok && wrong.isMissing {
		return l.errorf("%v\nwithout an account, try wxscan -demo",
			"%v\n没有公众号？可先试用 wxscan -demo", err)
	}
	if err != nil {
		return err
	}
	listener, err := listen(&c, l)
	if err != nil {
		return err
	}
	if c.demo {
		c.simulate(listener.Addr().(*net.TCPAddr))
		fmt.Fprintln(stdout, l.choose("open", "请打开"), c.publicURL)
	}
	lines, end := newLineWriter(stderr)
	defer end()
	log := newLog(lines, c.logLevel, c.logFormat)
	s := newServer(c, log)
	if s.redis != nil {
		if refused, ok := errors.AsType[refusal](s.redis.check(ctx)); ok {
			listener.Close()
			return fmt.Errorf("REDIS_URL: %w", refused)
		}
	}
	ctx, stop := context.WithCancel(ctx)
	var background sync.WaitGroup
	defer func() { stop(); background.Wait() }()
	background.Go(func() { s.work(ctx) })
	log.Info("listening", "addr", listener.Addr().String(), "url", c.publicURL)
	if c.demo {
		s.demo = newDemo(c, s.wechat.client, s.tickets)
		log.Warn("DEMO: WeChat is simulated, and ANYONE CAN LOG IN AS ANYONE")
	} else {
		adviseOperator(&c, log)
	}
	return serve(ctx, listener, s.routes(), log)
}

// adviseOperator logs what to enter on the account's page, and what to set better.
func adviseOperator(c *config, log *slog.Logger) {
	log.Info("to enter on the account's page", "interface_url", c.interfaceURL(), "authorization_domain", c.domain())
	if c.shortToken() {
		log.Warn("WECHAT_TOKEN is short enough to be guessed: " +
			"make it 16 characters or more, here and on the account's page")
	}
	if c.forgetful {
		log.Warn("SESSION_SECRET is not set: a restart logs everybody out")
	}
}

// valuesOf returns the value that each setting is given, by its name in the
// environment.
func valuesOf(settings []setting, flags *flag.FlagSet, args []string, getenv func(string) string) (
	map[string]string, error) {
	l, values := languageOf(getenv), make(map[string]string)
	flags.SetOutput(io.Discard)
	file := flags.String("env", "", "")
	for _, s := range settings {
		set := func(value string) error { values[s.env] = value; return nil }
		if s.kind == yesNo {
			flags.BoolFunc(s.flag, "", set)
		} else if s.flag != "" {
			flags.Func(s.flag, "", set)
		}
	}
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return nil, err
	case err != nil:
		return nil, badFlag(flags, args, l)
	case flags.NArg() > 0:
		return nil, l.errorf("unknown argument %q: a command goes first, and a flag begins with -",
			"未知参数 %q：命令应写在最前，选项以 - 开头", flags.Arg(0))
	}
	fromFile, err := readEnv(*file, l)
	for _, s := range settings {
		if _, byFlag := values[s.env]; !byFlag {
			values[s.env] = cmp.Or(getenv(s.env), fromFile[s.env])
		}
	}
	return values, err
}

// badFlag says what is wrong with the last flag that flags.Parse has read.
func badFlag(flags *flag.FlagSet, args []string, l language) error {
	word := args[max(0, len(args)-flags.NArg()-1)]
	name, _, _ := strings.Cut(strings.TrimLeft(word, "-"), "=") // what follows could be a secret
	if flags.Lookup(name) != nil {
		return l.errorf("flag -%s: its value is missing or malformed", "选项 -%s：缺少值或值格式不对", name)
	}
	var known []string
	flags.VisitAll(func(f *flag.Flag) { known = append(known, "-"+f.Name) })
	return l.errorf("unknown flag -%s: there are %s",
		"未知选项 -%s，可用的有 %s", name, strings.Join(known, " "))
}

// readEnv reads a file of lines NAME=value as systemd's EnvironmentFile does, except
// that it refuses what systemd would pass over or unescape: export, lines without a
// NAME=, backslashes outside of single quotes. An empty file name has no values.
func readEnv(file string, l language) (map[string]string, error) {
	if file == "" {
		return nil, nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, l.errorf("-env: cannot read %q: is the file there, and may this user read it?",
			"-env：无法读取 %q：文件存在吗？当前用户有权读取吗？", file)
	}
	assignment := regexp.MustCompile(`^([A-Za-z_]\w*)=\s*(?:"([^"\\]*)"|'([^']*)'|([^"'\\][^\\]*)?)$`)
	values := make(map[string]string)
	for i, line := range strings.Split(string(text), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		parts := assignment.FindStringSubmatch(line)
		if parts == nil { // not quoted: the line may hold a secret
			return nil, l.errorf(
				"%s, line %d: must be NAME=value, without export, and without a backslash except in single quotes",
				"%s 第 %d 行：应为 NAME=value，不带 export；单引号之外不能有反斜杠", file, i+1)
		}
		values[parts[1]] = parts[2] + parts[3] + parts[4]
	}
	return values, nil
}

// listen opens the listen address, with https if there is a certificate.
func listen(c *config, l language) (net.Listener, error) {
	if c.tlsCert != "" {
		if _, err := tls.LoadX509KeyPair(c.tlsCert, c.tlsKey); err != nil {
			return nil, l.errorf(
				"TLS_CERT (-tls-cert), TLS_KEY (-tls-key): %q, %q must be, in PEM, a certificate chain and its key: %q",
				"TLS_CERT (-tls-cert)、TLS_KEY (-tls-key)：%q 和 %q 应为 PEM 格式的证书链及其私钥：%q",
				c.tlsCert, c.tlsKey, err)
		}
	}
	listener, err := net.Listen("tcp", c.addr.String())
	if err != nil {
		return nil, cannotListen(err, c.addr.String(), l)
	}
	if c.tlsCert == "" {
		return listener, nil
	}
	return tls.NewListener(listener, &tls.Config{
		// Read at each handshake, so that a renewed certificate counts at once.
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(c.tlsCert, c.tlsKey)
			return &pair, err
		},
		// Over HTTP/1.1 a browser has six connections, and each parked poll takes one.
		NextProtos: []string{"h2", "http/1.1"},
	}), nil
}

func cannotListen(err error, addr string, l language) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return l.errorf(
			"ADDR (-addr): another program listens on %s: end it (ss -ltnp shows which), or choose another port",
			"ADDR (-addr)：%s 已被其他程序占用："+
				"请结束该程序（用 ss -ltnp 查看），或换一个端口", addr)
	case errors.Is(err, fs.ErrPermission):
		return l.errorf("ADDR (-addr): this user may not listen on %s: choose a port from 1024, or allow it: %s",
			"ADDR (-addr)：当前用户无权监听 %s：请改用 1024 或以上的端口，或授予权限：%s",
			addr, "sudo setcap cap_net_bind_service=+ep wxscan")
	}
	return l.errorf("ADDR (-addr): this computer cannot listen on %s: is the host one of its own addresses?",
		"ADDR (-addr)：无法监听 %s：主机部分是本机的地址吗？", addr)
}

// serve answers requests until ctx ends, which wakes the parked polls. It returns
// once the requests in flight are answered, or after shutdownGrace.
func serve(ctx context.Context, listener net.Listener, handler http.Handler, log *slog.Logger) error {
	var silent sync.Map // the connections that have not sent a byte: Shutdown would wait for them
	srv := &http.Server{
		ConnState: func(conn net.Conn, state http.ConnState) {
			if state == http.StateNew {
				silent.Store(conn, nil)
			} else {
				silent.Delete(conn)
			}
		},
		Handler:           handler,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       readTimeout,
		WriteTimeout:      (maxWait + 15) * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    8 << 10, // cookies included; net/http lets 4 KiB more through
		ErrorLog:          errorLog(log),
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(listener) }() // ends with Shutdown
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	for conn := range silent.Range {
		conn.(net.Conn).Close()
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace)
	defer cancel()
	if err := srv.Shutdown(grace); err != nil {
		log.Warn("requests cut off at shutdown", "err", err)
		srv.Close()
	}
	<-failed
	return nil
}
